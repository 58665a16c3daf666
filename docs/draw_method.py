"""`python docs/draw_method.py`: draws docs/method.svg, the figure of the method in the README."""

import random
from pathlib import Path

COLOURS = {"sky": "#9ec9e8", "tree": "#5a9a5c", "road": "#a99fb3"}
INK, PALE, HIDDEN = "#22303c", "#8795a1", "#e9e4da"
CELLS, SIZE = 8, 15  # tokens a side, and their size in the picture


def label_at(row, column):
    """The class of a token of the example: sky above, a round tree, a road below."""
    if (row - 3.4) ** 2 + (column - 4.6) ** 2 < 5.5:
        return "tree"
    return "sky" if row < 5 else "road"


def masked_tokens(seed=5):
    """Blocks of 2 x 2 tokens, half of them."""
    blocks = [(r, c) for r in range(0, CELLS, 2) for c in range(0, CELLS, 2)]
    chosen = random.Random(seed).sample(blocks, len(blocks) // 2)
    return {(r + i, c + j) for r, c in chosen for i in range(2) for j in range(2)}


class Drawing:
    def __init__(self, width, height):
        self.width, self.height, self.parts = width, height, []

    def add(self, text):
        self.parts.append(text)

    def text(self, x, y, words, *, size=13, weight="normal", colour=INK, anchor="middle"):
        style = f'font-size="{size}" font-weight="{weight}" fill="{colour}" text-anchor="{anchor}"'
        self.add(f'<text x="{x}" y="{y}" {style}>{words}</text>')

    def arrow(self, x1, y1, x2, y2, *, dashed=False):
        dash = ' stroke-dasharray="4 3"' if dashed else ""
        style = f'stroke="{INK}" stroke-width="1.4"{dash} marker-end="url(#tip)" fill="none"'
        self.add(f'<path d="M{x1} {y1} L{x2} {y2}" {style}/>')

    def box(self, x, y, width, height, words, *, fill="#ffffff"):
        self.add(f'<rect x="{x}" y="{y}" width="{width}" height="{height}" rx="7" fill="{fill}" stroke="{INK}"/>')
        for i, line in enumerate(words):
            self.text(x + width / 2, y + height / 2 + 5 + 17 * (i - (len(words) - 1) / 2), line)

    def tokens(self, x, y, colour_of):
        """The grid of tokens; colour_of(row, column) gives a colour, or None for a token that is not drawn."""
        for row in range(CELLS):
            for column in range(CELLS):
                colour = colour_of(row, column)
                if colour:
                    place = f'x="{x + column * SIZE}" y="{y + row * SIZE}" width="{SIZE}" height="{SIZE}"'
                    self.add(f'<rect {place} fill="{colour}" stroke="#ffffff" stroke-width="0.8"/>')
        self.add(f'<rect x="{x}" y="{y}" width="{CELLS * SIZE}" height="{CELLS * SIZE}" fill="none" stroke="{PALE}"/>')

    def write(self, path):
        head = (
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {self.width} {self.height}" width="{self.width}" '
            'font-family="Helvetica, Arial, sans-serif" role="img" '
            'aria-label="A masked image is reconstructed class by class">'
            '<defs><marker id="tip" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" orient="auto">'
            f'<path d="M0 0 L8 4 L0 8 z" fill="{INK}"/></marker></defs>'
            f'<rect width="{self.width}" height="{self.height}" rx="10" fill="#fbfaf7"/>'
        )
        path.write_text(head + "\n" + "\n".join(self.parts) + "\n</svg>\n")


def draw():
    d, side, masked = Drawing(1010, 400), CELLS * SIZE, masked_tokens()
    colour = lambda r, c: COLOURS[label_at(r, c)]  # noqa: E731

    d.text(90, 34, "image", weight="bold")
    d.tokens(30, 46, colour)
    d.text(90, 186, "classes: its labels, or", size=12, colour=PALE)
    d.text(90, 202, "confident pseudo-labels", size=12, colour=PALE)
    d.text(90, 234, "masked image", weight="bold")
    d.tokens(30, 246, lambda r, c: HIDDEN if (r, c) in masked else colour(r, c))
    d.text(90, 384, "blocks of tokens are hidden", size=12, colour=PALE)

    d.arrow(156, 306, 196, 306)
    d.box(198, 266, 132, 80, ["segmenter:", "encoder, decoder"], fill="#f1e7cf")

    d.arrow(330, 292, 418, 96)
    d.text(352, 150, "features", size=12, colour=PALE)
    d.arrow(330, 306, 418, 248)
    d.arrow(330, 322, 418, 352)
    d.text(372, 358, "logits", size=12, colour=PALE)

    d.text(610, 34, "pixel space: each class reconstructs its own hidden tokens from its own visible ones", weight="bold")
    d.box(422, 60, 92, 92, ["class-wise", "decoder"], fill="#dfeadf")
    for i, name in enumerate(COLOURS):
        x = 548 + i * 148
        d.tokens(
            x, 46,
            lambda r, c, name=name: None if label_at(r, c) != name else HIDDEN if (r, c) in masked else COLOURS[name],
        )  # fmt: skip
        d.text(x + side / 2, 182, name, size=12, colour=PALE)
    d.arrow(516, 106, 544, 106)

    d.text(
        422, 224, "feature space: hidden and visible tokens of a class are pulled together", weight="bold", anchor="start"
    )
    for i, (name, fill) in enumerate(COLOURS.items()):
        x, y = 470 + i * 170, 262
        d.add(f'<circle cx="{x}" cy="{y}" r="13" fill="{fill}" stroke="{INK}"/>')
        d.add(f'<circle cx="{x + 66}" cy="{y}" r="13" fill="{HIDDEN}" stroke="{fill}" stroke-width="4"/>')
        d.arrow(x + 49, y, x + 17, y, dashed=True)
        d.text(x + 33, y + 30, f"{name}: visible, hidden", size=11, colour=PALE)

    d.text(422, 330, "semantic space: the masked image gets the classes of the whole image", weight="bold", anchor="start")
    d.add(f'<rect x="422" y="342" width="14" height="14" fill="{COLOURS["tree"]}"/>')
    d.text(444, 354, "cross-entropy at every confident pixel, visible or hidden", size=12, colour=PALE, anchor="start")
    d.write(Path(__file__).with_name("method.svg"))


if __name__ == "__main__":
    draw()
