// The module tree: filter by name and by state, open and close.
(function () {
  const controls = document.getElementById("tree-controls");
  if (!controls) return;
  const tree = document.getElementById("tree");
  const name = document.getElementById("tree-name");
  const said = document.getElementById("tree-said");
  const states = [...controls.querySelectorAll("button[data-state]")];
  const convs = [...tree.querySelectorAll("li.conv")];
  const modules = [...tree.querySelectorAll("li.module")].reverse();
  const details = [...tree.querySelectorAll("li.module > details")];
  const asOpened = details.map((one) => one.open);
  let wasFiltered = false;
  controls.hidden = false;

  // A name with * or ? has to match as a whole, as in recipes; any other is looked for anywhere.
  function matcher(text) {
    if (!/[*?]/.test(text)) return (path) => path.toLowerCase().includes(text.toLowerCase());
    const escaped = text.replace(/[.+^${}()|[\]\\]/g, "\\$&").replace(/\*/g, ".*").replace(/\?/g, ".");
    const pattern = new RegExp("^" + escaped + "$", "i");
    return (path) => pattern.test(path);
  }
  function apply() {
    const text = name.value.trim();
    const fits = matcher(text);
    const shown = new Set(states.filter((one) => one.getAttribute("aria-pressed") === "true").map((one) => one.dataset.state));
    let count = 0;
    for (const conv of convs) {
      conv.hidden = !(shown.has(conv.dataset.state) && fits(conv.dataset.path));
      count += conv.hidden ? 0 : 1;
    }
    for (const one of modules) one.hidden = !one.querySelector("li.conv:not([hidden])");
    const isFiltered = text !== "";
    if (isFiltered) details.forEach((one) => { if (!one.parentElement.hidden) one.open = true; });
    else if (wasFiltered) details.forEach((one, i) => { one.open = asOpened[i]; });
    wasFiltered = isFiltered;
    tree.querySelectorAll("li.rest").forEach((one) => { one.hidden = isFiltered || shown.size < states.length; });
    said.textContent = count + " of " + convs.length + " convs shown";
  }
  name.addEventListener("input", apply);
  for (const one of states) {
    one.addEventListener("click", () => {
      one.setAttribute("aria-pressed", String(one.getAttribute("aria-pressed") !== "true"));
      apply();
    });
  }
  // What is pointed at, or focused, is said at the lower edge; opening a conv says it in place.
  const peek = document.getElementById("tree-peek");
  const hide = () => { peek.hidden = true; };
  const tell = (event) => {
    const conv = event.target.closest("li.conv");
    if (!conv) return;
    const path = document.createElement("strong");
    path.textContent = conv.dataset.path;
    const why = conv.querySelector(".why").textContent.slice(conv.dataset.path.length + 2);
    peek.replaceChildren(path, why);
    peek.hidden = conv.querySelector("details").open;
  };
  tree.addEventListener("pointerover", tell);
  tree.addEventListener("focusin", tell);
  tree.addEventListener("pointerleave", hide);
  tree.addEventListener("focusout", hide);
  tree.addEventListener("toggle", hide, true);
  tree.addEventListener("keydown", (event) => { if (event.key === "Escape") hide(); });
  document.getElementById("tree-open").addEventListener("click", () => details.forEach((one) => { one.open = true; }));
  document.getElementById("tree-close").addEventListener("click", () => details.forEach((one) => { one.open = false; }));
})();
