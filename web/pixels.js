// What a canvas shows: RGBA, bytes. The array clamps, and rounds as PyTorch does.

// Latents (C, h, w) -> RGBA (h, w, 4) by the manifest's linear map (C + 1, 3).
export function preview(x, colours) {
  const n = x.length / (colours.length - 1), bias = colours.at(-1);
  const pixels = new Uint8ClampedArray(4 * n).fill(255);
  for (let i = 0; i < n; i++) {
    for (let c = 0; c < 3; c++) {
      let level = bias[c];
      for (let k = 0; k + 1 < colours.length; k++) level += colours[k][c] * x[k * n + i];
      pixels[4 * i + c] = (level + 1) * 127.5;
    }
  }
  return pixels;
}

// A picture (3, H, W) in [-1, 1] -> RGBA (H, W, 4).
export function toPixels(image) {
  const n = image.length / 3, pixels = new Uint8ClampedArray(4 * n).fill(255);
  for (let i = 0; i < n; i++) {
    for (let c = 0; c < 3; c++) pixels[4 * i + c] = (image[c * n + i] + 1) * 127.5;
  }
  return pixels;
}
