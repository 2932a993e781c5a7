// The editor of an image: a mask painted at the image's own size, whatever size the browser shows it at. Files stay in the browser
// until they are sent with a request.
const timEditor = (() => {
  let root = null; // the element of the page's editor
  let file = null; // Blob of the image
  let strokes = []; // {erase, radius, points}: drawn again after an undo
  let stroke = null; // the one that is being painted
  let cursor = { x: 0, y: 0 };
  let waiting = null; // a file that was given before the editor was opened

  const find = (name) => root.querySelector(`[data-part=${name}]`);
  const dataURL = (blob) =>
    new Promise((resolve, reject) => {
      const reader = new FileReader();
      reader.onload = () => resolve(reader.result);
      reader.onerror = () => reject(reader.error);
      reader.readAsDataURL(blob);
    });

  function say(text, isError = false) {
    const note = find("note");
    note.textContent = text;
    note.classList.toggle("tim-error", isError);
  }

  function describe() {
    const mask = find("mask");
    const painted = strokes.some((each) => !each.erase);
    const effect = painted ? "Painted parts are drawn anew." : "Nothing is painted: all of it changes.";
    say(`${mask.width} × ${mask.height} pixels, and so is the result. ${effect}`);
  }

  async function open(blob, name) {
    const maximum = Number(root.dataset.maxBytes);
    if (blob.size > maximum) return say(`${name}: the limit of a file is ${Math.floor(maximum / 1e6)} MB`, true);
    const image = find("image");
    const url = URL.createObjectURL(blob);
    const probe = new Image();
    probe.src = url;
    try {
      await probe.decode();
    } catch {
      URL.revokeObjectURL(url);
      return say(`${name}: cannot be read as an image; give a PNG, JPEG, WebP or AVIF file`, true);
    }
    if (probe.naturalWidth * probe.naturalHeight > Number(root.dataset.maxPixels)) {
      URL.revokeObjectURL(url);
      return say(`${name}: has ${probe.naturalWidth}x${probe.naturalHeight} pixels, the limit is ${root.dataset.maxPixels} pixels`, true);
    }
    if (image.src.startsWith("blob:")) URL.revokeObjectURL(image.src);
    image.src = url;
    file = blob;
    const mask = find("mask");
    mask.width = probe.naturalWidth;
    mask.height = probe.naturalHeight;
    cursor = { x: mask.width / 2, y: mask.height / 2 };
    const size = find("size");
    size.max = Math.max(8, Math.ceil(Math.max(mask.width, mask.height) / 2));
    size.value = Math.max(32, Math.round(Math.max(mask.width, mask.height) / 10));
    strokes = [];
    find("work").hidden = false;
    describe();
  }

  function close() {
    file = null;
    strokes = [];
    find("work").hidden = true;
    find("image").removeAttribute("src");
    find("file").value = "";
    say("Without an image, the whole image is drawn from the prompt.");
  }

  // One segment of a stroke, or its first point, in pixels of the image.
  function paint({ erase, radius }, from, to) {
    const context = find("mask").getContext("2d");
    context.globalCompositeOperation = erase ? "destination-out" : "source-over";
    context.strokeStyle = context.fillStyle = "#e5265f";
    context.lineCap = "round";
    context.lineWidth = 2 * radius;
    context.beginPath();
    if (from.x === to.x && from.y === to.y) {
      context.arc(to.x, to.y, radius, 0, 2 * Math.PI);
      context.fill();
    } else {
      context.moveTo(from.x, from.y);
      context.lineTo(to.x, to.y);
      context.stroke();
    }
  }

  function begin(point) {
    stroke = { erase: find("erase").checked, radius: Number(find("size").value) / 2, points: [point] };
    strokes.push(stroke);
    paint(stroke, point, point);
  }

  function extend(point) {
    paint(stroke, stroke.points.at(-1), point);
    stroke.points.push(point);
  }

  function repaint() {
    const mask = find("mask");
    mask.getContext("2d").clearRect(0, 0, mask.width, mask.height);
    for (const each of strokes) each.points.forEach((point, k) => paint(each, each.points[Math.max(0, k - 1)], point));
    describe();
  }

  function pointOf(event) {
    const mask = find("mask");
    const box = mask.getBoundingClientRect();
    return { x: ((event.clientX - box.left) * mask.width) / box.width, y: ((event.clientY - box.top) * mask.height) / box.height };
  }

  function showCursor() {
    const mask = find("mask");
    const ring = find("ring");
    const size = Number(find("size").value);
    ring.style.left = `${(100 * (cursor.x - size / 2)) / mask.width}%`;
    ring.style.top = `${(100 * (cursor.y - size / 2)) / mask.height}%`;
    ring.style.width = `${(100 * size) / mask.width}%`;
    ring.style.height = `${(100 * size) / mask.height}%`;
  }

  function onKey(event) {
    const mask = find("mask");
    const moves = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };
    if (event.key in moves) {
      const length = event.shiftKey ? 1 : Math.max(1, Number(find("size").value) / 2);
      const [dx, dy] = moves[event.key];
      const within = (value, limit) => Math.min(limit, Math.max(0, value));
      cursor = { x: within(cursor.x + dx * length, mask.width), y: within(cursor.y + dy * length, mask.height) };
    } else if (event.key === " ") {
      begin({ ...cursor });
      describe();
    } else {
      return;
    }
    event.preventDefault();
    showCursor();
  }

  function listen() {
    const mask = find("mask");
    mask.addEventListener("pointerdown", (event) => {
      mask.setPointerCapture(event.pointerId);
      cursor = pointOf(event);
      begin(cursor);
      showCursor();
    });
    mask.addEventListener("pointermove", (event) => {
      cursor = pointOf(event);
      showCursor();
      if (stroke && event.buttons) extend(cursor);
    });
    for (const end of ["pointerup", "pointercancel"]) {
      mask.addEventListener(end, () => {
        stroke = null;
        describe();
      });
    }
    mask.addEventListener("keydown", onKey);
    mask.addEventListener("focus", showCursor);
    find("size").addEventListener("input", showCursor);
    find("undo").addEventListener("click", () => {
      strokes.pop();
      repaint();
    });
    find("clear").addEventListener("click", () => {
      strokes = [];
      repaint();
    });
    find("remove").addEventListener("click", close);
    find("native").addEventListener("change", (event) => find("frame").classList.toggle("tim-native", event.target.checked));
    timFiles.listen(root, (given) => open(given, given.name));
  }

  // The painted pixels as a PNG of the image's size: white where they are, black elsewhere.
  function maskURL() {
    const mask = find("mask");
    const pixels = mask.getContext("2d").getImageData(0, 0, mask.width, mask.height);
    const data = pixels.data;
    let painted = false;
    for (let k = 0; k < data.length; k += 4) {
      const value = data[k + 3] >= 128 ? 255 : 0;
      painted ||= value > 0;
      data[k] = data[k + 1] = data[k + 2] = value;
      data[k + 3] = 255;
    }
    if (!painted) return null;
    const copy = document.createElement("canvas");
    copy.width = mask.width;
    copy.height = mask.height;
    copy.getContext("2d").putImageData(pixels, 0, 0);
    return copy.toDataURL("image/png");
  }

  return {
    start(element) {
      root = element.querySelector(".tim-editor");
      file = null;
      listen();
      close();
      if (waiting) open(waiting, "image");
      waiting = null;
    },
    // Start from one of the server's images.
    async use(url) {
      const answer = await fetch(url);
      if (!answer.ok) return;
      const blob = await answer.blob();
      if (root && root.isConnected) await open(blob, "image");
      else waiting = blob;
    },
    // [image, mask] as data URLs, null for none.
    async content() {
      if (!file || !root || !root.isConnected) return [waiting ? await dataURL(waiting) : null, null];
      return [await dataURL(file), strokes.length ? maskURL() : null];
    },
  };
})();
