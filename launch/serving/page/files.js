// Files that are dropped or chosen.
const timFiles = {
  // Call `receive` with each file that is dropped on an element's zone or chosen in its file input.
  listen(element, receive) {
    const input = element.querySelector("input[type=file]");
    const zone = input.closest(".tim-drop");
    input.addEventListener("change", () => {
      if (input.files.length) receive(input.files[0]);
      input.value = "";
    });
    for (const name of ["dragenter", "dragover"]) zone.addEventListener(name, () => zone.classList.add("tim-over"));
    for (const name of ["dragleave", "drop"]) zone.addEventListener(name, () => zone.classList.remove("tim-over"));
    zone.addEventListener("drop", (event) => {
      event.preventDefault(); // also tells the listener of the document that the file is taken
      if (event.dataTransfer.files.length) receive(event.dataTransfer.files[0]);
    });
  },
  // A drop zone that hands its file, as a data URL, to a listener of the page. Files that are dropped beside any zone are its own.
  send(element, trigger, maxBytes) {
    const give = (file) => {
      if (file.size > maxBytes) return trigger("refuse", { name: file.name, reason: "size" });
      const reader = new FileReader();
      reader.onload = () => trigger("give", { content: reader.result, name: file.name });
      reader.onerror = () => trigger("refuse", { name: file.name, reason: "unreadable" });
      reader.readAsDataURL(file);
    };
    this.listen(element, give);
    this.beside = give;
  },
};

// Without this, a browser leaves the page for a file that is dropped beside a zone.
document.addEventListener("dragover", (event) => event.preventDefault());
document.addEventListener("drop", (event) => {
  if (event.defaultPrevented) return;
  const [file] = event.dataTransfer.files;
  if (!file && event.target.closest("input, textarea")) return; // a text
  event.preventDefault();
  if (file) timFiles.beside?.(file);
});
