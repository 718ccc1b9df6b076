"use strict";
document.documentElement.classList.add("js");
for (const box of document.querySelectorAll(".stages")) {
  const slider = box.querySelector("input[type=range]");
  const output = box.querySelector("output");
  const figures = [...box.querySelectorAll("figure[data-stage]")];
  if (!slider) continue;
  const show = () => {
    figures.forEach((figure, i) => { figure.hidden = i !== Number(slider.value); });
    const name = figures[Number(slider.value)].dataset.stage;
    output.textContent = name;
    slider.setAttribute("aria-valuetext", name);
  };
  slider.addEventListener("input", show);
  show();
}
