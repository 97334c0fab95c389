"use strict";
(() => {
  const number = (text) => {
    const found = text.replace(/[,<+%*]/g, "").replace(/\u2212/g, "-").match(/^-?\d*\.?\d+/);
    return found ? Number(found[0]) : null;
  };
  const sortRows = (table, column, isText, direction) => {
    const body = table.tBodies[0];
    const key = (row) => {
      const text = row.cells[column].textContent.trim();
      return isText ? (text === "\u2013" ? null : text) : number(text);
    };
    const keyed = Array.from(body.rows, (row) => [key(row), row]);
    keyed.sort(([a], [b]) => {
      if (a === null || b === null) return (a === null) - (b === null);
      return direction * (isText ? a.localeCompare(b, "en", { numeric: true }) : a - b);
    });
    body.append(...keyed.map(([, row]) => row));
  };
  for (const table of document.querySelectorAll("table[data-sortable]")) {
    const heads = Array.from(table.tHead.rows[0].cells);
    heads.forEach((head, column) => {
      const isText = head.classList.contains("w");
      const button = document.createElement("button");
      button.type = "button";
      button.textContent = head.textContent;
      head.replaceChildren(button);
      head.setAttribute("aria-sort", "none");
      button.addEventListener("click", () => {
        const rises = head.getAttribute("aria-sort") !== "ascending";
        heads.forEach((other) => other.setAttribute("aria-sort", "none"));
        head.setAttribute("aria-sort", rises ? "ascending" : "descending");
        sortRows(table, column, isText, rises ? 1 : -1);
      });
    });
  }

  const tip = document.getElementById("tip");
  const hide = () => { tip.hidden = true; };
  const show = (link) => {
    tip.textContent = link.getAttribute("aria-label");
    tip.hidden = false;
    const box = link.getBoundingClientRect();
    const left = Math.min(Math.max(box.left + box.width / 2 - tip.offsetWidth / 2, 8),
      document.documentElement.clientWidth - tip.offsetWidth - 8);
    const above = box.top - tip.offsetHeight - 6;
    tip.style.left = `${left + scrollX}px`;
    tip.style.top = `${(above > 0 ? above : box.bottom + 6) + scrollY}px`;
  };
  for (const link of document.querySelectorAll("figure svg a")) {
    const title = link.querySelector("title");
    link.setAttribute("aria-label", title.textContent);
    title.remove();
    link.addEventListener("pointerenter", () => show(link));
    link.addEventListener("focus", () => show(link));
    link.addEventListener("pointerleave", hide);
    link.addEventListener("blur", hide);
  }
  addEventListener("keydown", (event) => { if (event.key === "Escape") hide(); });

  const open = () => {
    const target = location.hash && document.getElementById(location.hash.slice(1));
    const recipe = target && target.matches("article") && target.querySelector("details");
    if (recipe) recipe.open = true;
  };
  addEventListener("hashchange", open);
  open();
})();
