// What browsers do not make of KaTeX's MathML by themselves: letters of other alphabets, struck-out terms, the space
// after log, braces under terms, and an index under an operator's name, where KaTeX's invisible sign U+2061 would be one
// child too many.
function repairMath(root) {
  const exceptions = {
    "double-struck": {C: "ℂ", H: "ℍ", N: "ℕ", P: "ℙ", Q: "ℚ", R: "ℝ", Z: "ℤ"},
    script: {B: "ℬ", E: "ℰ", F: "ℱ", H: "ℋ", I: "ℐ", L: "ℒ", M: "ℳ", R: "ℛ"},
    bold: {},
  };
  const first = {"double-struck": 0x1d538, script: 0x1d49c, bold: 0x1d400};
  for (const e of root.querySelectorAll("math [mathvariant]")) {
    const kind = e.getAttribute("mathvariant"), letter = e.textContent;
    if (kind in first && /^[A-Z]$/.test(letter)) {
      e.textContent = exceptions[kind][letter] ?? String.fromCodePoint(first[kind] + letter.charCodeAt(0) - 65);
      e.removeAttribute("mathvariant");
    }
  }
  for (const e of root.querySelectorAll("math mo")) {
    if (e.textContent !== "\u2061") continue;
    if (/^m(frac|sub|sup|subsup|under|over|underover)$/.test(e.parentNode.localName)) { e.remove(); continue; }
    const next = e.nextElementSibling;
    if (!next || /^[(\[]/.test(next.textContent)) continue;
    const space = document.createElementNS("http://www.w3.org/1998/Math/MathML", "mspace");
    space.setAttribute("width", "0.17em");
    e.replaceWith(space);
  }
  for (const e of root.querySelectorAll("math munder > mo")) {
    const base = e.previousElementSibling;
    if (e.textContent !== "\u23df" || !base) continue;
    base.style.cssText = "border-bottom: 2px solid; border-radius: 0 0 7px 7px; padding: 0 3px 5px";
    e.parentNode.replaceWith(base);
  }
}
