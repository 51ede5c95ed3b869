"use strict";
(() => {
  const tip = document.getElementById("tip");
  const describe = (el) => {
    if (el.dataset.tip) return el.dataset.tip;
    const exact = el.dataset.e === undefined ? "" : "\nexact advantage " + el.dataset.e;
    const text = el.textContent.trim(), words = text.length > 80 ? text.slice(0, 79) + "…" : text;
    const clipped = el.matches(".high") ? "\nclipped above" : el.matches(".low") ? "\nclipped below" : "";
    return "“" + words + "”  " + el.closest(".map").dataset.name + " " + el.dataset.v + exact + clipped;
  };
  const show = (event) => {
    const el = event.target.closest("[data-tip], [data-v]");
    if (!el) { tip.hidden = true; return; }
    tip.textContent = describe(el);
    tip.hidden = false;
    const at = el.getBoundingClientRect(), box = tip.getBoundingClientRect();
    const left = Math.min(Math.max(8, at.left + at.width / 2 - box.width / 2), innerWidth - box.width - 8);
    const above = at.top - box.height - 8;
    tip.style.left = left + "px";
    tip.style.top = (above > 4 ? above : at.bottom + 8) + "px";
  };
  document.addEventListener("pointerover", show);
  document.addEventListener("pointerdown", show);
  document.addEventListener("scroll", () => { tip.hidden = true; }, { passive: true, capture: true });
  const numbers = document.querySelectorAll("[data-numbers]");
  for (const box of numbers) {
    box.addEventListener("change", () => {
      document.body.classList.toggle("numbers", box.checked);
      for (const other of numbers) other.checked = box.checked;
    });
  }
  for (const box of document.querySelectorAll("[data-source]")) {
    box.addEventListener("change", () => {
      for (const map of document.querySelectorAll('[data-of="' + box.dataset.source + '"]')) {
        map.hidden = !box.checked;
      }
    });
  }
})();
