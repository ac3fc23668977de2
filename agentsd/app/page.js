() => {
  // Called when a job begins: on a phone its status is below the controls.
  window.agentsdReveal = (id) => {
    const element = document.getElementById(id);
    const { top, bottom } = element.getBoundingClientRect();
    if (top < 0 || bottom > innerHeight) element.scrollIntoView({ block: "start" });
  };

  for (const id of ["status", "plot-status", "viewer-status", "explain-status", "schedule-message"]) {
    document.getElementById(id)?.setAttribute("aria-live", "polite");
  }

  document.addEventListener("keydown", (event) => {
    if (event.key !== "Enter" || !(event.ctrlKey || event.metaKey)) return;
    event.preventDefault();
    document.getElementById("generate").click();
  }, true);
}
