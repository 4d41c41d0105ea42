"""Every name of the hub that the course uses, each pinned to a commit: the table `data/hub.json`.

A revision of null is not pinned yet: it would be the newest. `python -m rlhf_edu pin` asks the hub and fills it in.
"""

import json
from pathlib import Path

from .errors import explained

TABLE = Path(__file__).resolve().parent.parent / "data" / "hub.json"


def table() -> dict[str, dict]:
    """name -> {"kind": model or dataset, "revision", "for"}."""
    with explained(f"reading {TABLE}", "restore it with `git checkout data/hub.json`"):
        return json.loads(TABLE.read_text(encoding="utf-8"))


def revision(name) -> str:
    """The pinned commit of `name`; "main", the newest, for a name that is not in the table or not pinned yet."""
    return table().get(str(name), {}).get("revision") or "main"


def pin() -> list[str]:
    """Pin what has no revision yet to the newest commit of the hub; the names that were pinned."""
    from huggingface_hub import HfApi

    rows, done = table(), []
    for name, row in rows.items():
        if row["revision"] is None:
            with explained(f"asking the hub about {name}", "connect to the network and try again"):
                info = HfApi().dataset_info if row["kind"] == "dataset" else HfApi().model_info
                row["revision"] = info(name).sha
            done.append(name)
    TABLE.write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")
    return done
