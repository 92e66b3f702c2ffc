"""Draw the position of each method in a transformer block.

python scripts/draw_methods.py            write docs/guide/*.svg
python scripts/draw_methods.py --check    exit with 1 if a picture is not up to date

The same picture is used for light and dark themes: its colors follow the system.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from html import escape
from pathlib import Path

FOLDER = Path(__file__).resolve().parents[1] / "docs/guide"
_STYLE = """\
text{font:13px system-ui,sans-serif;text-anchor:middle;fill:#24292f}
.s{font-size:11px}
.box{fill:#eef1f4;stroke:#8c959f}
.frame{fill:none;stroke:#8c959f;stroke-dasharray:5 4}
.line{fill:none;stroke:#8c959f;stroke-width:1.5}
.on{fill:#5b5bd6;stroke:#3f3fb0}
.lit{fill:#fff}
@media (prefers-color-scheme:dark){text{fill:#d7dde4}.box{fill:#2b3138;stroke:#6e7781}
.on{fill:#8d8df5;stroke:#b8b8ff}.lit{fill:#14161a}}"""

Box = tuple[int, int, int, int]
PARTS: dict[str, Box] = {
    "embedding": (96, 135, 84, 60),
    "norm 1": (226, 125, 46, 80),
    "q": (296, 55, 44, 40),
    "k": (296, 145, 44, 40),
    "v": (296, 235, 44, 40),
    "attention": (388, 105, 80, 120),
    "o": (502, 145, 44, 40),
    "norm 2": (592, 125, 46, 80),
    "up": (662, 145, 44, 40),
    "down": (752, 145, 44, 40),
    "head": (872, 135, 60, 60),
}
"""Part of a block → x, y, width and height."""
_WIDTH, _HEIGHT = 950, 330
LINEARS = ("q", "k", "v", "o", "up", "down")


@dataclass(frozen=True)
class Drawing:
    """What a method trains.

    Attributes:
        mark: label of the trained parts.
        added: linear layers with an additive update.
        scaled: linear layers whose output is scaled.
        inside: linear layers followed by a trained layer.
        keys: whether trained keys and values are prepended.
        tokens: whether trained embeddings are prepended.
        trained: parts that are trained directly.
    """

    mark: str = ""
    added: tuple[str, ...] = ()
    scaled: tuple[str, ...] = ()
    inside: tuple[str, ...] = ()
    keys: bool = False
    tokens: bool = False
    trained: tuple[str, ...] = ()


DRAWINGS = {
    "lora": Drawing("A B", added=LINEARS),
    "qlora": Drawing("A B", added=LINEARS),
    "adalora": Drawing("P Λ Q", added=LINEARS),
    "ia3": Drawing("×", scaled=("k", "v", "up")),
    "vera": Drawing("d b", added=LINEARS),
    "adapter": Drawing("adapter", inside=("o", "down")),
    "prefix": Drawing("P", keys=True),
    "prompt": Drawing("P", tokens=True),
    "p-tuning": Drawing("P", tokens=True),
    "ln-tuning": Drawing(trained=("norm 1", "norm 2")),
    "full": Drawing(trained=("embedding", "norm 1", *LINEARS, "norm 2", "head")),
}


def draw(name: str, drawing: Drawing) -> str:
    """Return the picture of a method as SVG."""
    label = f"Where {name} sits in a transformer's block"
    body = "\n".join([*_base(drawing), *_trained(drawing), *_legend()])
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" '
        f'aria-label="{escape(label)}">\n<title>{escape(label)}</title>\n<style>{_STYLE}</style>\n'
        f"{body}\n</svg>\n"
    )


def _box(box: Box, text: str, *, is_trained: bool = False, small: bool = False) -> str:
    x, y, w, h = box
    size, lit = (" s" if small else ""), (" lit" if is_trained else "")
    kind = "on" if is_trained else "box"
    return (
        f'<rect class="{kind}" x="{x}" y="{y}" width="{w}" height="{h}" rx="5"/>'
        f'<text class="t{size}{lit}" x="{x + w / 2:g}" y="{y + h / 2 + 4:g}">{escape(text)}</text>'
    )


def _line(*points: tuple[float, float]) -> str:
    return f'<path class="line" d="M{" L".join(f"{x:g} {y:g}" for x, y in points)}"/>'


def _base(drawing: Drawing) -> Iterator[str]:
    """Yield the transformer block; parts that are trained directly are highlighted."""
    yield '<rect class="frame" x="206" y="22" width="640" height="276" rx="10"/>'
    yield '<text class="s" x="250" y="40">block, × N</text>'
    yield '<text x="48" y="169">tokens</text>'
    row = [(76, 165), (96, 165)], [(180, 165), (226, 165)], [(468, 165), (502, 165)]
    for points in (*row, [(546, 165), (592, 165)], [(638, 165), (662, 165)],
                   [(706, 165), (752, 165)], [(796, 165), (872, 165)]):  # fmt: skip
        yield _line(*points)
    for part in ("q", "k", "v"):
        y = PARTS[part][1] + 20
        yield _line((272, 165), (284, 165), (284, y), (296, y))
        yield _line((340, y), (388, min(max(y, 115), 215)))
    yield _line((206, 165), (212, 165), (212, 66), (568, 66), (568, 165))  # past attention
    yield _line((580, 165), (580, 250), (820, 250), (820, 165))  # past the feed-forward
    for x in (568, 820):
        yield f'<circle class="box" cx="{x}" cy="165" r="8"/>'
        yield f'<text class="s" x="{x}" y="169">+</text>'
    for name, box in PARTS.items():
        yield _box(box, name.split()[0], is_trained=name in drawing.trained)


def _trained(drawing: Drawing) -> Iterator[str]:
    """Yield the parts that a method adds."""
    for part in drawing.added:
        x, y, w, h = PARTS[part]
        yield _box((x - 4, y + h + 5, w + 8, 18), drawing.mark, is_trained=True, small=True)
    for part in drawing.scaled:
        x, y, w, h = PARTS[part]
        yield _round(x + w + 14, y + h // 2, drawing.mark)
    for part in drawing.inside:
        x, y, w, _ = PARTS[part]
        yield _box((x + w - 30, y + 52, 60, 22), drawing.mark, is_trained=True, small=True)
        yield _line((x + w + 4, y + 20), (x + w + 4, y + 52))
    if drawing.keys:
        for part in ("k", "v"):
            x, y, w, _ = PARTS[part]
            yield _box((x + w + 8, y - 26, 28, 20), drawing.mark, is_trained=True, small=True)
            yield _line((x + w + 36, y - 16), (388, min(max(y - 6, 115), 215)))
    if drawing.tokens:
        yield _box((110, 88, 56, 24), f"{drawing.mark} × 20", is_trained=True, small=True)
        yield _line((166, 100), (196, 100), (196, 165))


def _round(x: int, y: int, text: str) -> str:
    return (
        f'<circle class="on" cx="{x}" cy="{y}" r="11"/>'
        f'<text class="s lit" x="{x}" y="{y + 4}">{escape(text)}</text>'
    )


def _legend() -> Iterator[str]:
    yield '<rect class="box" x="20" y="300" width="16" height="16" rx="3"/>'
    yield '<text class="s" x="64" y="312">frozen</text>'
    yield '<rect class="on" x="100" y="300" width="16" height="16" rx="3"/>'
    yield '<text class="s" x="146" y="312">trained</text>'


def main(arguments: list[str] | None = None) -> int:
    """Write the pictures, or check them."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--check", action="store_true", help="write nothing")
    args = parser.parse_args(arguments)
    stale = 0
    FOLDER.mkdir(exist_ok=True)
    for name, drawing in DRAWINGS.items():
        path, text = FOLDER / f"{name}.svg", draw(name, drawing)
        if path.is_file() and path.read_text(encoding="utf-8") == text:
            continue
        stale += 1
        if args.check:
            print(f"{path} is not up to date: python scripts/draw_methods.py")
        else:
            path.write_text(text, encoding="utf-8")
    return int(args.check and stale > 0)


if __name__ == "__main__":
    sys.exit(main())
