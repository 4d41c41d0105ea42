"""The hub scales from end to end without the hub: tiny stand-ins of the same architectures lie in its cache."""

import dataclasses
import json
import re
import shutil
import types
from pathlib import Path

import datasets
import numpy as np
import pandas as pd
import pytest
import tokenizers
import torch
import transformers
from datasets.arrow_writer import ArrowWriter
from huggingface_hub import constants

from rlhf_edu import data, experiments, hub, imdb, lesson, models, rewards, scales, tokens, training
from rlhf_edu.__main__ import main
from rlhf_edu.errors import UserError

HUB = Path(constants.HF_HUB_CACHE)  # of these tests alone, see conftest.py


def snapshot(name: str) -> Path:
    """Where the hub's cache keeps the pinned revision of a model."""
    return HUB / f"models--{name.replace('/', '--')}" / "snapshots" / hub.revision(name)


def byte_level_bpe(texts, folder: Path, **special) -> None:
    """A tokenizer as GPT-2 and RoBERTa have, learned here."""
    bpe = tokenizers.ByteLevelBPETokenizer()
    bpe.train_from_iterator(
        texts, vocab_size=400, special_tokens=list(dict.fromkeys(special.values())), show_progress=False
    )
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=bpe._tokenizer, model_max_length=512, **special
    ).save_pretrained(folder)


def word_piece(texts, folder: Path) -> None:
    """A tokenizer as DistilBERT has: lower case, ## in front of what continues a word, [CLS] and [SEP] around."""
    pieces = tokenizers.BertWordPieceTokenizer(lowercase=True)
    pieces.train_from_iterator(texts, vocab_size=300, min_frequency=1, show_progress=False)
    folder.mkdir(parents=True, exist_ok=True)
    pieces.save_model(str(folder))
    transformers.DistilBertTokenizer(str(folder / "vocab.txt")).save_pretrained(folder)


def classifier(config, folder: Path) -> None:
    torch.manual_seed(1)
    transformers.AutoModelForSequenceClassification.from_config(config).save_pretrained(folder)


def write_imdb(sentences) -> None:
    """`stanfordnlp/imdb` as the datasets library caches it: text, label (-1 in `unsupervised`), three splits."""
    features = datasets.Features(
        {"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["neg", "pos"])}
    )
    folder = (
        Path(datasets.config.HF_DATASETS_CACHE) / "stanfordnlp___imdb" / "plain_text" / "0.0.0" / ("0" * 40)
    )
    folder.mkdir(parents=True)
    generator, infos = np.random.default_rng(0), {}
    for split in ("train", "test", "unsupervised"):
        with ArrowWriter(features=features, path=str(folder / f"imdb-{split}.arrow")) as writer:
            for n in range(40):
                text = "<br />".join(generator.choice(sentences, 12))
                writer.write({"text": text, "label": -1 if split == "unsupervised" else n % 2})
            count, size = writer.finalize()
        infos[split] = datasets.SplitInfo(split, num_bytes=size, num_examples=count, dataset_name="imdb")
    datasets.DatasetInfo(
        features=features, splits=datasets.splits.SplitDict(infos), dataset_name="imdb", builder_name="parquet",
        config_name="plain_text", version=datasets.Version("0.0.0"),
    ).write_to_directory(str(folder))  # fmt: skip


@pytest.fixture(scope="module")
def stand_ins(sentences):
    """Everything that the hub scales load, in the cache of the hub; gone afterwards."""
    small = {"n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 128}
    for name in (scales.SCALES["gpt2"].policy, scales.SCALES["paper"].policy):
        folder = snapshot(name)
        end = "<|endoftext|>"
        byte_level_bpe(sentences, folder, bos_token=end, eos_token=end, unk_token=end)
        config = transformers.GPT2Config(vocab_size=400, bos_token_id=0, eos_token_id=0, **small)
        torch.manual_seed(0)
        transformers.GPT2LMHeadModel(config).save_pretrained(folder)
    labels = {"id2label": {0: "NEGATIVE", 1: "POSITIVE"}, "label2id": {"NEGATIVE": 0, "POSITIVE": 1}}
    folder = snapshot(scales.SCALES["gpt2"].oracle)
    word_piece(sentences, folder)
    config = transformers.DistilBertConfig(
        vocab_size=300, dim=32, n_layers=1, n_heads=2, hidden_dim=64, **labels
    )
    classifier(config, folder)
    folder = snapshot(scales.SCALES["paper"].oracle)
    special = {"bos_token": "<s>", "pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    byte_level_bpe(sentences, folder, **special)
    config = transformers.RobertaConfig(
        vocab_size=400, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64,
        max_position_embeddings=514, **labels,
    )  # fmt: skip
    classifier(config, folder)
    write_imdb(sentences)
    yield
    shutil.rmtree(HUB)
    shutil.rmtree(datasets.config.HF_DATASETS_CACHE)


def cut(scale: scales.Scale) -> scales.Scale:
    """The scale with few prompts and steps, and steps large enough to be seen; names, kinds and settings stay."""
    ppo = dataclasses.replace(scale.ppo, rollouts=1, episodes=8, max_tokens=8, sample_batch=4)
    return dataclasses.replace(
        scale, sft_steps=2, sft_batch=8, train_prompts=8, heldout_prompts=4, max_tokens=8, pairs_a_batch=24,
        evaluations=1, best_of=4, ppo=ppo, ppo_targets=(3.0,), dpo_betas=(0.1,), unlikelihood_alphas=(0.5,),
        memory=dataclasses.replace(scale.memory, micro_batch=8), learning_rate=1e-3, sft_learning_rate=1e-3,
    )  # fmt: skip


@pytest.mark.parametrize("name", ["gpt2", "paper"])
def test_hub_scale_from_end_to_end_offline(name, stand_ins, tmp_path, monkeypatch, capsys):
    scale = cut(scales.SCALES[name])
    monkeypatch.setitem(scales.SCALES, name, scale)
    monkeypatch.setattr(training, "set_threads", lambda threads=None: None)
    only = "DPO,PPO" if name == "gpt2" else "Preferred-FT"
    assert main(["reproduce", "--scale", name, "--output", str(tmp_path), "--methods", only]) == 0
    out = capsys.readouterr().out
    assert f"policy='{scale.policy}'" in out and "Estimate: " in out and "Peak memory: " in out
    config = json.loads((tmp_path / "config.json").read_text())["scale"]
    assert config["oracle"] == scale.oracle and config["memory"]["micro_batch"] == 8
    frontier = pd.read_csv(tmp_path / "frontier.csv")
    assert set(frontier["method"]) == {"SFT", *only.split(",")}
    assert frontier["reward"].between(0, 1).all()
    assert (frontier.loc[frontier["step"] > 0, "kl"] > 1e-6).all()  # every method moved the policy
    rewards_seen = [r["rewards"] for r in data.read_completions(tmp_path / "completions.jsonl")]
    assert np.std(rewards_seen) > 0  # the oracle read the texts
    if name == "gpt2":
        loss = pd.read_csv(tmp_path / "training" / "DPO_beta0.1.csv")["loss"].dropna()
        assert loss.iloc[0] == pytest.approx(np.log(2), abs=1e-5)
        card = json.loads((tmp_path / "reward_model" / "card.json").read_text())
        assert 0 <= card["heldout_pair_accuracy"] <= 1


@pytest.fixture(scope="module")
def gpt2_run(stand_ins, tmp_path_factory):
    """(the scale, the folder of its finished main job) with enough prompts for the notebooks."""
    scale = dataclasses.replace(  # enough of SFT that responses end, some sooner than others
        cut(scales.SCALES["gpt2"]), train_prompts=30, heldout_prompts=12, max_tokens=20, sft_steps=60,
        sft_learning_rate=5e-3,
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("gpt2") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(scales.SCALES, "gpt2", scale)
        patch.setattr(training, "set_threads", lambda threads=None: None)
        assert main(["reproduce", "--scale", "gpt2", "--output", str(folder), "--methods", "PPO"]) == 0
    return scale, folder


NOTEBOOKS = sorted(Path(__file__).resolve().parent.parent.glob("notebooks/0[5678]_*.ipynb"))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem[:2])
def test_the_papers_experiments_run_as_notebooks_at_the_scale_gpt2(path, gpt2_run, monkeypatch):
    """All cells, with policy, reward model, prompts and comparisons of the run; sizes as small as those of `smoke`."""
    scale, run = gpt2_run
    monkeypatch.setitem(scales.SCALES, "gpt2", scale)
    monkeypatch.setenv("RLHF_EDU_SCALE", "gpt2")
    monkeypatch.setenv("RLHF_EDU_RUN", str(run))
    monkeypatch.chdir(path.parent)
    small = lambda self, mini, smoke=None, hub=None: min(x for x in (smoke or mini, hub) if x is not None)
    monkeypatch.setattr(lesson.Lesson, "sized", small)
    space = {"__name__": "__main__", "display": lambda *_: None}
    for number, cell in enumerate(json.loads(path.read_text(encoding="utf-8"))["cells"]):
        if cell["cell_type"] == "code":
            exec(compile("".join(cell["source"]), f"cell {number}", "exec"), space)
    world = space["world"]
    assert world.scale == "gpt2" and world.sft.config.n_embd == 32 and world.sft.config.n_layer == 2
    assert world.tokenizer.name_or_path == scale.policy
    assert world.oracle.config.model_type == "distilbert"
    assert {c["prompt"] for c in space["completions"]} <= {c["prompt"] for c in world.completions()}


def test_a_notebook_at_the_scale_gpt2_says_what_it_needs_first(tmp_path, monkeypatch):
    monkeypatch.setenv("RLHF_EDU_SCALE", "gpt2")
    monkeypatch.setenv("RLHF_EDU_RUN", str(tmp_path))
    world = lesson.start()
    assert world.scale == "mini"
    with pytest.raises(UserError, match="has no sft: first run `python -m rlhf_edu reproduce --scale gpt2`"):
        world.at_scale()
    monkeypatch.setenv("RLHF_EDU_SCALE", "smoke")
    world = lesson.start()
    assert world.at_scale() is world


def test_prompts_are_starts_of_2_to_8_tokens_of_long_reviews(stand_ins, tmp_path):
    job = experiments.Job(cut(scales.SCALES["gpt2"]), 0, tmp_path, None, None)
    job.tokenizer = tokens.load_tokenizer(job.scale.policy)
    reviews = imdb.load_imdb("hub")
    assert {r["label"] for r in reviews["unsupervised"]} == {-1} and {
        r["label"] for r in reviews["test"]
    } == {0, 1}
    short = {"text": "Zebras are short.", "label": 1}
    prompts = job.real_prompts([*reviews["train"], short] * 2, 30)
    assert len(set(prompts)) == len(prompts) > 8 and not [p for p in prompts if "Zebra" in p]
    lengths = {len(ids) for ids in tokens.encode(job.tokenizer, prompts)}
    assert lengths <= set(range(2, 9)) and len(lengths) > 3
    assert all(any(r["text"].startswith(p) for r in reviews["train"]) for p in prompts)


@pytest.mark.parametrize("name", ["gpt2", "paper"])
def test_oracle_reads_prompt_and_response_as_text(name, stand_ins):
    scale = scales.SCALES[name]
    tokenizer = tokens.load_tokenizer(scale.policy)
    oracle_tokenizer = tokens.load_tokenizer(scale.oracle)
    score = rewards.text_oracle_score(
        models.load_classifier(scale.oracle, "cpu"), oracle_tokenizer, tokenizer
    )
    prompts, ends = ["The film", "Her acting was"], [" was great to the end.", " weak."]
    given = score(tokens.encode(tokenizer, prompts), tokens.encode_responses(tokenizer, ends, max_tokens=48))
    pipeline = transformers.pipeline("text-classification", str(snapshot(scale.oracle)), top_k=None)
    for text, value in zip(["The film was great to the end.", "Her acting was weak."], given, strict=True):
        answers = {a["label"]: a["score"] for a in pipeline([text])[0]}
        assert value == pytest.approx(answers["POSITIVE"], abs=1e-5)


def test_reward_model_sees_the_end_where_eos_also_pads(stand_ins):
    tokenizer = tokens.load_tokenizer(scales.SCALES["gpt2"].policy)
    end = tokenizer.eos_token_id
    assert tokenizer.pad_token_id == end
    model = models.classifier_from(models.load_policy(scales.SCALES["gpt2"].policy, "cpu"), labels=1, seed=0)
    prompts, responses = [[5, 6], [7, 8, 9], [5, 6]], [[10, end], [11, 12, 13, 14, end], [10]]
    together = rewards.classifier_logits(model, end, prompts, responses)[:, 0]
    for prompt, response, value in zip(prompts, responses, together, strict=True):
        with torch.no_grad():
            hidden = model.base_model(torch.tensor([prompt + response])).last_hidden_state
            assert value.item() == pytest.approx(model.score(hidden)[0, -1, 0].item(), abs=1e-6)
    assert abs(together[0] - together[2]) > 1e-3  # ended or not makes a difference


def test_every_hub_name_is_pinned():
    table = hub.table()
    used = [name for s in scales.SCALES.values() for name in (s.policy, s.oracle) if tokens.is_hub_name(name)]
    assert len(used) == 4
    for name in (*used, imdb.HUB_NAME):
        assert re.fullmatch("[0-9a-f]{40}", table[name]["revision"]), name
    assert all(re.fullmatch("[0-9a-f]{40}", row["revision"] or "") for row in table.values())
    assert hub.revision("somebody/else") == "main"


def test_pin_fills_in_what_is_open(tmp_path, monkeypatch, capsys):
    table = {
        "a/model": {"kind": "model", "revision": None},
        "a/set": {"kind": "dataset", "revision": "1" * 40},
    }
    path = tmp_path / "hub.json"
    path.write_text(json.dumps(table))
    monkeypatch.setattr(hub, "TABLE", path)
    info = types.SimpleNamespace(sha="2" * 40)
    api = types.SimpleNamespace(model_info=lambda name: info, dataset_info=lambda name: 1 / 0)
    monkeypatch.setattr("huggingface_hub.HfApi", lambda: api)
    assert main(["pin"]) == 0
    assert "a/model" in capsys.readouterr().out
    assert (hub.revision("a/model"), hub.revision("a/set")) == ("2" * 40, "1" * 40)


def test_pin_without_network_is_one_sentence(tmp_path, monkeypatch, capsys):
    path = tmp_path / "hub.json"
    path.write_text(json.dumps({"a/model": {"kind": "model", "revision": None}}))
    monkeypatch.setattr(hub, "TABLE", path)
    assert main(["pin"]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert "asking the hub about a/model" in line and "connect to the network" in line
    assert json.loads(path.read_text())["a/model"]["revision"] is None
