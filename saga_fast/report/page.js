// Tabs by the ARIA pattern: a click or arrow keys choose; every panel is in the page, so without this all of them show.
document.documentElement.classList.add("js");
for (const tabbed of document.querySelectorAll(".tabbed")) {
  const tabs = [...tabbed.querySelector(":scope > [role=tablist]").children];
  const panels = tabs.map((tab) => document.getElementById(tab.getAttribute("aria-controls")));
  let current = 0;
  const select = (index) => {
    current = (index + tabs.length) % tabs.length;
    tabs.forEach((tab, i) => {
      tab.setAttribute("aria-selected", i === current);
      tab.tabIndex = i === current ? 0 : -1;
      panels[i].hidden = i !== current;
    });
  };
  tabs.forEach((tab, i) => tab.addEventListener("click", () => select(i)));
  // Also with the focus in a panel: there the innermost tabs take the key.
  tabbed.addEventListener("keydown", (event) => {
    const to = { ArrowLeft: current - 1, ArrowRight: current + 1, Home: 0, End: tabs.length - 1 }[event.key];
    if (to === undefined || event.altKey || event.ctrlKey || event.metaKey || event.shiftKey) return;
    const onTab = tabs.includes(event.target);
    select(to);
    (onTab ? tabs[current] : panels[current]).focus();
    event.preventDefault();
    event.stopPropagation();
  });
  select(0);
}
