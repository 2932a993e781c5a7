// The mask of an image, painted at the image's own size. What was done is kept, so that it can be undone.
const timMask = (() => {
  const canvas = document.createElement("canvas");
  const COLOUR = "#e5265f";
  const SAMPLED = 256; // pixels a side, from which the painted share is estimated
  let done = []; // strokes {erase, radius, points}, "clear" and "invert"
  let undone = [];

  // One segment of a stroke, or its first point, in pixels of the image.
  function paint({ erase, radius }, from, to) {
    const context = canvas.getContext("2d");
    context.globalCompositeOperation = erase ? "destination-out" : "source-over";
    context.strokeStyle = context.fillStyle = COLOUR;
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

  function apply(action) {
    const context = canvas.getContext("2d");
    if (action === "clear") {
      context.clearRect(0, 0, canvas.width, canvas.height);
    } else if (action === "invert") {
      context.globalCompositeOperation = "xor";
      context.fillStyle = COLOUR;
      context.fillRect(0, 0, canvas.width, canvas.height);
    } else {
      action.points.forEach((point, k) => paint(action, action.points[Math.max(0, k - 1)], point));
    }
  }

  function repaint() {
    apply("clear");
    done.forEach(apply);
  }

  return {
    canvas,
    reset(width, height) {
      canvas.width = width;
      canvas.height = height;
      done = [];
      undone = [];
    },
    begin(point, { erase, radius }) {
      done.push({ erase, radius, points: [point] });
      undone = [];
      paint(done.at(-1), point, point);
    },
    extend(point) {
      const stroke = done.at(-1);
      paint(stroke, stroke.points.at(-1), point);
      stroke.points.push(point);
    },
    // "clear" or "invert".
    change(action) {
      done.push(action);
      undone = [];
      apply(action);
    },
    undo() {
      if (done.length) undone.push(done.pop());
      repaint();
    },
    redo() {
      if (undone.length) done.push(undone.pop());
      repaint();
    },
    // A stroke of a finger that turns out to be a gesture of two.
    forget() {
      done.pop();
      repaint();
    },
    get canUndo() {
      return done.length > 0;
    },
    get canRedo() {
      return undone.length > 0;
    },
    // About the painted share of the image, from 0 to 1.
    share() {
      if (!done.length) return 0;
      const small = document.createElement("canvas");
      small.width = small.height = SAMPLED;
      const context = small.getContext("2d", { willReadFrequently: true });
      context.imageSmoothingQuality = "high";
      context.drawImage(canvas, 0, 0, SAMPLED, SAMPLED);
      const data = context.getImageData(0, 0, SAMPLED, SAMPLED).data;
      let sum = 0;
      for (let k = 3; k < data.length; k += 4) sum += data[k];
      return sum / 255 / SAMPLED ** 2;
    },
    // The painted pixels as a PNG of the image's size: white where they are, black elsewhere; null if there are none.
    url() {
      if (!done.length) return null;
      const pixels = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height);
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
      copy.width = canvas.width;
      copy.height = canvas.height;
      copy.getContext("2d").putImageData(pixels, 0, 0);
      return copy.toDataURL("image/png");
    },
  };
})();
