() => {
  const reveal = (id) => {
    const element = document.getElementById(id);
    const { top, bottom } = element.getBoundingClientRect();
    if (top < 0 || bottom > innerHeight) element.scrollIntoView({ block: "start" });
  };
  window.agentsdReveal = reveal;
  for (const id of ["status", "plot-status", "viewer-status"]) {
    document.getElementById(id)?.setAttribute("aria-live", "polite");
  }
  document.addEventListener("keydown", (event) => {
    if (event.key !== "Enter" || !(event.ctrlKey || event.metaKey)) return;
    event.preventDefault();
    document.getElementById("generate").click();
  }, true);
}
