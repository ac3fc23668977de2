() => {
  // Called when a job begins: on a phone its status is below the controls.
  window.agentsdReveal = (id) => {
    const element = document.getElementById(id);
    const { top, bottom } = element.getBoundingClientRect();
    if (top < 0 || bottom > innerHeight) element.scrollIntoView({ block: "start" });
  };

  for (const id of ["status", "plot-status", "viewer-status", "schedule-message"]) {
    document.getElementById(id)?.setAttribute("aria-live", "polite");
  }

  document.addEventListener("keydown", (event) => {
    if (event.key !== "Enter" || !(event.ctrlKey || event.metaKey)) return;
    event.preventDefault();
    document.getElementById("generate").click();
  }, true);

  // Gradio's divider can be dragged only, and its images have no text.
  const comparison = document.getElementById("comparison");
  const describe = () => {
    const names = ["Original image", "Image by agentsd"];
    comparison.querySelectorAll("img").forEach((image, i) => { image.alt = names[i]; });
    const divider = comparison.querySelector("[data-testid=slider]");
    if (!divider || divider.tabIndex === 0) return;
    divider.tabIndex = 0;
    divider.setAttribute("role", "slider");
    divider.setAttribute("aria-label", "Divider between the original image and that of agentsd");
    const report = () => {
      const { left, width } = divider.parentElement.getBoundingClientRect();
      const box = divider.getBoundingClientRect();
      const share = (box.left + box.width / 2 - left) / width;
      divider.setAttribute("aria-valuenow", Math.round(100 * share));
    };
    report();
    divider.addEventListener("keydown", (event) => {
      const steps = { ArrowLeft: -1, ArrowDown: -1, ArrowRight: 1, ArrowUp: 1 }[event.key];
      if (!steps) return;
      event.preventDefault();
      const box = divider.getBoundingClientRect();
      const at = { clientX: box.left + box.width / 2, clientY: box.top + box.height / 2 };
      const mouse = (type, target, move) => target.dispatchEvent(new MouseEvent(type, {
        bubbles: true, view: window, button: 0, clientX: at.clientX + move, clientY: at.clientY,
      }));
      const move = (steps * divider.parentElement.clientWidth) / 20;
      mouse("mousedown", divider, 0);
      mouse("mousemove", window, move);
      mouse("mouseup", window, move);
      requestAnimationFrame(report);
    });
  };
  new MutationObserver(describe).observe(comparison, { childList: true, subtree: true });
}
