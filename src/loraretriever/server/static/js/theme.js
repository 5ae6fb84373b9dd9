// Runs before the page is drawn, so that it never flashes in the wrong theme. Not a module: those wait.
(() => {
  const theme = localStorage.getItem("loraretriever.theme");
  if (theme === "light" || theme === "dark") document.documentElement.dataset.theme = theme;
})();
