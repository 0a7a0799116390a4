// The costs: one chart at a time, chosen by buttons. Printed, or without a script, all are shown.
(function () {
  const controls = document.getElementById("costs-controls");
  if (!controls) return;
  const buttons = [...controls.querySelectorAll("button")];
  const figures = [...document.querySelectorAll("figure[data-costs]")];
  const choose = (name) => {
    for (const one of buttons) one.setAttribute("aria-pressed", String(one.dataset.costs === name));
    for (const one of figures) one.classList.toggle("aside", one.dataset.costs !== name);
  };
  controls.hidden = false;
  for (const one of buttons) one.addEventListener("click", () => choose(one.dataset.costs));
  choose(buttons[0].dataset.costs);
})();
