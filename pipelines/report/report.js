"use strict";
// Follow a category: what is not on its route fades. The page says the same without.
(() => {
  const bar = document.querySelector("[data-follow-bar]");
  if (!bar) return;
  bar.hidden = false;
  const marked = [...document.querySelectorAll("[data-c]")];
  let followed = null;
  bar.addEventListener("click", (event) => {
    const chip = event.target.closest("button");
    if (!chip) return;
    followed = chip.value === followed || chip.value === "" ? null : chip.value;
    for (const each of bar.querySelectorAll("button")) each.setAttribute("aria-pressed", String(each.value === followed));
    for (const each of marked) {
      each.classList.toggle("off", followed !== null && !each.dataset.c.split(" ").includes(followed));
    }
  });
})();
