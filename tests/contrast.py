"""Contrast of a text to its background, as WCAG measures it, in a page."""

CONTRAST_OF = """
  const rgb = (text) => text.match(/[\\d.]+/g).map(Number);
  const light = (c) => {
    const [r, g, b] = c.slice(0, 3).map((v) => {
      v /= 255;
      return v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4;
    });
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const contrastOf = (element) => {
    const text = light(rgb(getComputedStyle(element).color));
    let back = null;
    for (let at = element; at && !back; at = at.parentElement) {
      const colour = rgb(getComputedStyle(at).backgroundColor);
      if (colour.length < 4 || colour[3] > 0.9) back = colour;
    }
    const behind = light(back ?? [255, 255, 255]);
    return (Math.max(text, behind) + 0.05) / (Math.min(text, behind) + 0.05);
  };
"""
"""Defines ``contrastOf(element)`` in a function's body."""
