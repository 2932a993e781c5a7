// Buttons, requests, announcements and keys of the page.

// Buttons in HTML that the server writes: their data attributes go to the listener.
function timActions(element, trigger) {
  element.addEventListener("click", async (event) => {
    const button = event.target.closest("[data-action]");
    if (!button) return;
    const { action, id, url } = button.dataset;
    if (action === "input" && !(await timEditor.use(url))) return trigger("act", { action: "gone", id });
    if (action === "delete") timKeepFocus(element, button);
    trigger("act", { action, id: id ?? "" });
  });
  // The server keeps a number of images.
  const lost = (event) => {
    if (event.target.tagName === "IMG") event.target.replaceWith(Object.assign(document.createElement("em"), { textContent: "gone" }));
  };
  element.addEventListener("error", lost, true);
}

// After the list was written anew without the button's item, the focus goes to the button that took its place.
function timKeepFocus(element, button) {
  const same = () => [...element.querySelectorAll(`[data-action=${button.dataset.action}]`)];
  const place = same().indexOf(button);
  const observer = new MutationObserver(() => {
    observer.disconnect();
    const rest = same();
    (rest[Math.min(place, rest.length - 1)] ?? document.querySelector("#tim-drop input")).focus();
  });
  observer.observe(element, { childList: true, subtree: true });
}

// The values of a request, with image, mask and key, which are in the browser. On a phone, results are below the controls.
async function timRequest(values) {
  const isStill = matchMedia("(prefers-reduced-motion: reduce)").matches;
  if (window.innerWidth <= 700) document.getElementById("tim-status").scrollIntoView({ behavior: isStill ? "auto" : "smooth" });
  timServer.check();
  return [...(await timEditor.content(values[2])), ...values.slice(3)];
}

// Screen readers say the status line: of steps only the first, errors at once.
function timAnnounce(element) {
  const region = (role, live) => {
    const found = document.querySelector(`.tim-said[role=${role}]`);
    if (found) return found;
    const made = Object.assign(document.createElement("div"), { className: "tim-said" });
    made.setAttribute("role", role);
    made.setAttribute("aria-live", live);
    return document.body.appendChild(made);
  };
  const calm = region("status", "polite");
  const urgent = region("alert", "assertive");
  let wasStep = false;
  const announce = () => {
    const line = element.querySelector(".tim-status");
    const isStep = line?.dataset.busy === "drawing";
    if (!line || (wasStep && isStep)) return;
    wasStep = isStep;
    const isError = line.classList.contains("tim-error");
    calm.textContent = isError ? "" : line.textContent;
    urgent.textContent = isError ? line.textContent : "";
  };
  new MutationObserver(announce).observe(element, { childList: true, characterData: true, subtree: true });
}

// Whether the server is there. Without this, a line that says what is drawn would stay for ever.
const timServer = {
  isLost: false,
  async check() {
    const answers = await fetch("api/model").then(
      (answer) => answer.status < 500, // a proxy answers for it
      () => false,
    );
    if (answers && this.isLost) location.reload();
    const line = document.querySelector("#tim-status .tim-status");
    if (answers || !line) return;
    this.isLost = true;
    line.className = "tim-status tim-error";
    line.textContent = "The server does not answer. The page is loaded again when it does; what you typed stays.";
    delete line.dataset.busy;
  },
  // While a request waits or is drawn, and until the server is back.
  watch() {
    setInterval(() => {
      if (this.isLost || document.querySelector("#tim-status [data-busy]")) this.check();
    }, 3000);
  },
};
timServer.watch();

// What was typed, kept for this tab, so that it is there again after a reload. name: of the model.
const timKept = {
  keep(name, values) {
    sessionStorage.setItem(`tim ${name}`, JSON.stringify(values));
  },
  // The kept values, or those that are there.
  values(name, present) {
    const kept = JSON.parse(sessionStorage.getItem(`tim ${name}`) ?? "null");
    return Array.isArray(kept) && kept.length === present.length ? kept : present;
  },
};

document.addEventListener("keydown", (event) => {
  const press = (id) => document.getElementById(id)?.click();
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) {
    event.preventDefault();
    document.activeElement?.dispatchEvent(new Event("change", { bubbles: true }));
    press("tim-draw");
  } else if (event.key === "Escape" && !event.defaultPrevented) {
    press("tim-stop");
  }
});
