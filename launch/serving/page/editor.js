// The editor of an image: the mask over it, whatever size the browser shows it at, and the borders to add. The file stays in the browser
// until it is sent with a request, and survives that gradio builds the section anew.
const timEditor = (() => {
  const canvas = timMask.canvas;
  let root = null; // the element of the page's editor, once it was shown
  let file = null; // Blob of the image
  let url = null; // of the file, for the browser
  let key = null; // tells the server whether it has the file already
  let borders = [0, 0, 0, 0]; // pixels to add: left, top, right, bottom
  let painting = false;
  let cursor = { x: 0, y: 0 };
  let message = null; // [text, isError] in place of the description

  const find = (name) => root.querySelector(`[data-part=${name}]`);
  const isShown = () => root !== null && root.isConnected;
  const dataURL = (blob) =>
    new Promise((resolve, reject) => {
      const reader = new FileReader();
      reader.onload = () => resolve(reader.result);
      reader.onerror = () => reject(reader.error);
      reader.readAsDataURL(blob);
    });

  function say(text, isError = false) {
    if (!isShown()) return;
    const note = find("note");
    if (note.textContent !== text) note.textContent = text;
    note.classList.toggle("tim-error", isError);
  }

  const limits = () => ({ side: Number(root.dataset.maxSide), pixels: Number(root.dataset.maxPixels) });

  // What exceeds a limit, "" if nothing does.
  function excess(width, height) {
    if (!isShown()) return "";
    const { side, pixels } = limits();
    if (Math.max(width, height) > side) return `${width} × ${height}: the limit is ${side} pixels a side`;
    if (width * height > pixels) return `${width} × ${height}: has ${width * height} pixels, the limit is ${pixels}`;
    return "";
  }

  function resultSize() {
    const [left, top, right, bottom] = borders;
    return [canvas.width + left + right, canvas.height + top + bottom];
  }

  function describe() {
    if (!isShown()) return;
    if (message) return say(...message);
    if (!file) return say("Without an image, everything is drawn from the prompt.");
    const [width, height] = resultSize();
    const isExtended = borders.some((each) => each > 0);
    const share = timMask.share();
    const percent = share < 0.01 ? "Less than 1 %" : `${Math.round(100 * share)} %`;
    const size = `${canvas.width} × ${canvas.height} pixels, and so is the result.`;
    const extended = `${canvas.width} × ${canvas.height} pixels; the result has ${width} × ${height}.`;
    if (excess(width, height)) say(`With its borders ${excess(width, height)}`, true);
    else if (isExtended && share) say("A mask and borders exclude each other: clear the mask, or set the borders to 0.", true);
    else if (isExtended) say(`${extended} The added pixels are drawn anew.`);
    else if (share) say(`${size} ${percent} is painted and drawn anew, the rest stays.`);
    else say(`${size} Nothing is painted: all of it changes.`);
  }

  async function open(blob, name) {
    const refuse = (text) => {
      message = [`${name}: ${text}`, true];
      describe();
      return false;
    };
    if (isShown() && blob.size > Number(root.dataset.maxBytes)) {
      return refuse(`the limit of a file is ${Math.floor(Number(root.dataset.maxBytes) / 1e6)} MB`);
    }
    const probe = new Image();
    let held = null;
    try {
      held = new Blob([await blob.arrayBuffer()], { type: blob.type }); // the file may change on the disk
      probe.src = URL.createObjectURL(held);
      await probe.decode();
    } catch {
      URL.revokeObjectURL(probe.src);
      return refuse("cannot be read as an image; give a PNG, JPEG, WebP or AVIF file");
    }
    const wrong = excess(probe.naturalWidth, probe.naturalHeight);
    if (wrong) {
      URL.revokeObjectURL(probe.src);
      return refuse(wrong);
    }
    if (url) URL.revokeObjectURL(url);
    url = probe.src;
    file = held;
    key = `${Date.now()}-${Math.random()}`;
    message = null;
    timMask.reset(probe.naturalWidth, probe.naturalHeight);
    cursor = { x: canvas.width / 2, y: canvas.height / 2 };
    show();
    return true;
  }

  function close() {
    if (url) URL.revokeObjectURL(url);
    file = url = key = message = null;
    timMask.reset(1, 1);
    show();
    if (isShown()) find("file").focus();
  }

  // Show the state in the element, which may be a new one.
  function show() {
    document.documentElement.classList.toggle("tim-has-image", file !== null);
    if (!isShown()) return;
    find("work").hidden = !file;
    if (file) {
      const longer = Math.max(canvas.width, canvas.height);
      const image = find("image");
      if (image.src !== url) image.src = url;
      image.classList.toggle("tim-pixels", longer < 512);
      const size = find("size");
      size.max = Math.max(8, Math.ceil(longer / 2));
      size.value = Math.max(32, Math.round(longer / 10));
      arrange();
      showCursor();
    } else {
      find("image").removeAttribute("src");
    }
    update();
  }

  // The image within its borders.
  function arrange() {
    if (!isShown() || !file) return;
    const [width, height] = resultSize();
    const sheet = find("sheet");
    const art = find("art");
    sheet.style.aspectRatio = `${width} / ${height}`;
    sheet.style.width = find("native").checked ? `${width}px` : `min(100%, ${(70 * width) / height}vh)`;
    art.style.left = `${(100 * borders[0]) / width}%`;
    art.style.top = `${(100 * borders[1]) / height}%`;
    art.style.width = `${(100 * canvas.width) / width}%`;
    art.style.height = `${(100 * canvas.height) / height}%`;
  }

  function update() {
    find("undo").setAttribute("aria-disabled", String(!timMask.canUndo));
    find("redo").setAttribute("aria-disabled", String(!timMask.canRedo));
    find("brush").textContent = `${find("size").value} pixels`;
    describe();
  }

  function pointOf(event) {
    const box = canvas.getBoundingClientRect();
    return { x: ((event.clientX - box.left) * canvas.width) / box.width, y: ((event.clientY - box.top) * canvas.height) / box.height };
  }

  function showCursor() {
    const ring = find("ring");
    const size = Number(find("size").value);
    ring.style.left = `${(100 * (cursor.x - size / 2)) / canvas.width}%`;
    ring.style.top = `${(100 * (cursor.y - size / 2)) / canvas.height}%`;
    ring.style.width = `${(100 * size) / canvas.width}%`;
    ring.style.height = `${(100 * size) / canvas.height}%`;
  }

  function begin() {
    message = null;
    timMask.begin({ ...cursor }, { erase: find("erase").checked, radius: Number(find("size").value) / 2 });
  }

  function onKey(event) {
    const moves = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };
    const letter = event.ctrlKey || event.metaKey ? event.key.toLowerCase() : "";
    if (event.key in moves) {
      const length = event.shiftKey ? 1 : Math.max(1, Number(find("size").value) / 2);
      const [dx, dy] = moves[event.key];
      const within = (value, limit) => Math.min(limit, Math.max(0, value));
      cursor = { x: within(cursor.x + dx * length, canvas.width), y: within(cursor.y + dy * length, canvas.height) };
    } else if (event.key === " ") {
      begin();
    } else if (letter === "y" || (letter === "z" && event.shiftKey)) {
      timMask.redo();
    } else if (letter === "z") {
      timMask.undo();
    } else {
      return;
    }
    event.preventDefault();
    showCursor();
    update();
  }

  function listenToCanvas() {
    canvas.tabIndex = 0;
    canvas.setAttribute("role", "application"); // keys go to it, not to the screen reader
    canvas.setAttribute("aria-label", "Mask: arrow keys move the brush, with Shift by one pixel; Space paints");
    canvas.addEventListener("pointerdown", (event) => {
      if (!event.isPrimary || event.button !== 0) return;
      canvas.setPointerCapture(event.pointerId);
      cursor = pointOf(event);
      painting = true;
      begin();
      showCursor();
    });
    canvas.addEventListener("pointermove", (event) => {
      if (!event.isPrimary) return;
      cursor = pointOf(event);
      showCursor();
      if (painting) timMask.extend(cursor);
    });
    canvas.addEventListener("pointerup", (event) => {
      if (!event.isPrimary || !painting) return;
      painting = false;
      update();
    });
    canvas.addEventListener("pointercancel", () => {
      if (painting) timMask.forget();
      painting = false;
      update();
    });
    canvas.addEventListener("keydown", onKey);
    canvas.addEventListener("focus", () => showCursor());
  }

  function listen() {
    const actions = {
      undo: () => timMask.undo(),
      redo: () => timMask.redo(),
      clear: () => timMask.change("clear"),
      invert: () => timMask.change("invert"),
    };
    for (const [name, action] of Object.entries(actions)) {
      find(name).addEventListener("click", () => {
        message = null;
        action();
        update();
      });
    }
    find("size").addEventListener("input", () => {
      showCursor();
      update();
    });
    find("remove").addEventListener("click", close);
    find("native").addEventListener("change", arrange);
    timFiles.listen(root, (given) => open(given, given.name));
  }

  listenToCanvas();
  return {
    // gradio has built the section, perhaps again.
    start(element) {
      root = element.querySelector(".tim-editor");
      find("ring").before(canvas);
      listen();
      show();
    },
    // Start from one of the server's images. Returns whether it is there.
    async use(address) {
      const answer = await fetch(address).catch(() => null);
      const isOpen = answer !== null && answer.ok && (await open(await answer.blob(), "image"));
      if (isOpen) document.getElementById("tim-change").scrollIntoView({ block: "nearest" });
      return isOpen;
    },
    // Pixels to add: left, top, right, bottom.
    border(pixels) {
      borders = pixels.map((each) => Math.max(0, Math.round(Number(each) || 0)));
      message = null;
      arrange();
      describe();
    },
    // [image, mask, key]: image and mask as data URLs, null for none. The image is null also if `sent` is its key.
    async content(sent) {
      if (!file) return [null, null, null];
      return [key === sent ? null : await dataURL(file), timMask.url(), key];
    },
  };
})();
