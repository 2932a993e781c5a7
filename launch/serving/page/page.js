// Files that are dropped or chosen, and the keys of the page.
const timFiles = {
  // Call `receive` with each file that is dropped on an element or chosen in its file input.
  listen(element, receive) {
    const input = element.querySelector("input[type=file]");
    const zone = input.closest(".tim-drop");
    input.addEventListener("change", () => {
      if (input.files.length) receive(input.files[0]);
      input.value = "";
    });
    for (const name of ["dragenter", "dragover"]) {
      zone.addEventListener(name, (event) => {
        event.preventDefault();
        zone.classList.add("tim-over");
      });
    }
    for (const name of ["dragleave", "drop"]) zone.addEventListener(name, () => zone.classList.remove("tim-over"));
    zone.addEventListener("drop", (event) => {
      event.preventDefault();
      if (event.dataTransfer.files.length) receive(event.dataTransfer.files[0]);
    });
  },
  // A drop zone that hands its file, as a data URL, to a listener of the page.
  send(element, trigger, maxBytes) {
    this.listen(element, (file) => {
      if (file.size > maxBytes) return trigger("refuse", { name: file.name });
      const reader = new FileReader();
      reader.onload = () => trigger("give", { content: reader.result, name: file.name });
      reader.readAsDataURL(file);
    });
  },
};

// Buttons in HTML that the server writes: their data attributes go to the listener.
function timActions(element, trigger) {
  element.addEventListener("click", (event) => {
    const button = event.target.closest("[data-action]");
    if (!button) return;
    if (button.dataset.action === "input") timEditor.use(button.dataset.url);
    trigger("act", { ...button.dataset });
  });
}

// The values of a request, with image and mask, which are in the browser. On a phone, results are below the controls.
async function timRequest(values) {
  if (window.innerWidth <= 700) document.getElementById("tim-status").scrollIntoView({ behavior: "smooth" });
  return [...(await timEditor.content()), ...values.slice(2)];
}

document.addEventListener("keydown", (event) => {
  const press = (id) => document.getElementById(id)?.click();
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) {
    event.preventDefault();
    document.activeElement?.dispatchEvent(new Event("change", { bubbles: true }));
    press("tim-draw");
  } else if (event.key === "Escape") {
    press("tim-stop");
  }
});
