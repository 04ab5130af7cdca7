"""Files in, tensors out: Cityscapes, Dark Zurich, ACDC, Nighttime Driving, and a demo city drawn in the same
layouts. Knows no model.

Images leave as (3, H, W) uint8 RGB, labels as (H, W) uint8 trainIds with 255 = ignore: the device makes
floats of them. What is wrong with files raises DataError, whose one line names the file and what was expected
there.
"""

import collections
import csv
import functools
import hashlib
import os
import random
import struct
import uuid
import warnings
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFilter, ImageOps
from torchvision.transforms.v2 import functional as TF

IGNORE = 255

# The official table: name, trainId = place in this list, labelId, colour.
CLASSES = (
    ("road", 7, (128, 64, 128)), ("sidewalk", 8, (244, 35, 232)), ("building", 11, (70, 70, 70)),
    ("wall", 12, (102, 102, 156)), ("fence", 13, (190, 153, 153)), ("pole", 17, (153, 153, 153)),
    ("traffic light", 19, (250, 170, 30)), ("traffic sign", 20, (220, 220, 0)),
    ("vegetation", 21, (107, 142, 35)), ("terrain", 22, (152, 251, 152)), ("sky", 23, (70, 130, 180)),
    ("person", 24, (220, 20, 60)), ("rider", 25, (255, 0, 0)), ("car", 26, (0, 0, 142)),
    ("truck", 27, (0, 0, 70)), ("bus", 28, (0, 60, 100)), ("train", 31, (0, 80, 100)),
    ("motorcycle", 32, (0, 0, 230)), ("bicycle", 33, (119, 11, 32)),
)  # fmt: skip
NAMES = tuple(name for name, _, _ in CLASSES)
# Stored value -> trainId; None: no such label exists, the file is wrong.
TABLES = {
    "labelIds": [IGNORE] * 34 + [None] * 221 + [IGNORE],
    "labelTrainIds": [*range(len(CLASSES))] + [None] * (255 - len(CLASSES)) + [IGNORE],
}
for _train_id, (_, _label_id, _) in enumerate(CLASSES):
    TABLES["labelIds"][_label_id] = _train_id
PALETTE = torch.tensor(
    [colour for _, _, colour in CLASSES] + [(0, 0, 0)] * (256 - len(CLASSES)), dtype=torch.uint8
)


class DataError(ValueError):
    """A file is missing, unreadable or not what its name promises."""


def one_line(error):
    """What to tell a user of an exception; one raised in a loader worker arrives wrapped in its traceback."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[-1].removeprefix("datasets.DataError: ")


def colourise(labels):
    """(..., H, W) uint8 or int64 trainIds -> (..., 3, H, W) uint8 in the Cityscapes colours, ignore in
    black."""
    return PALETTE[labels.long().cpu()].movedim(-1, -3)


# ---- files -------------------------------------------------------------------------------------------------


def size_of(path):
    """(width, height) as `open_image` gives it, from the header alone where that tells. Raises DataError."""
    return _opened(path, lambda image: _upright(image).size)


def open_image(path):
    """Decoded RGB Pillow image. Raises DataError."""
    image = _decode(path)
    if image.mode not in ("RGB", "RGBA", "P", "L"):
        raise DataError(f"{path}: expected an 8-bit RGB image, found mode {image.mode}")
    return _upright(image).convert("RGB")


def _upright(image):
    """A phone's picture as people see it; PNGs, the data sets' format, as they are stored, like labels."""
    if image.format != "PNG":
        ImageOps.exif_transpose(image, in_place=True)
    return image


def open_label(path, kind=None):
    """Decoded label as a Pillow image of trainIds; the file's name says whether it stores labelIds or
    labelTrainIds, its values are checked. kind "invIds": a mask of 0 and 1 instead. Raises DataError."""
    kind = kind or ("labelTrainIds" if Path(path).stem.endswith("labelTrainIds") else "labelIds")
    image = _decode(path)
    if image.mode == "P":  # the indices are the labels, whatever colours they have
        image = Image.frombytes("L", image.size, image.tobytes())
    if image.mode != "L":
        raise DataError(f"{path}: expected an 8-bit single-channel label, found mode {image.mode}")
    table = [0, 1] + [None] * 254 if kind == "invIds" else TABLES[kind]
    wrong = [value for value, count in enumerate(image.histogram()) if count and table[value] is None]
    if wrong:
        known = {"labelIds": "0-33, 255", "labelTrainIds": "0-18, 255", "invIds": "0, 1"}[kind]
        raise DataError(f"{path}: value {wrong[0]} is no {kind} value ({known})")
    return image.point([IGNORE if value is None else value for value in table])


def _decode(path):
    def load(image):
        image.load()
        return image

    return _opened(path, load)


def _opened(path, use):
    """use(Pillow image); what Pillow raises, a dozen types on damaged files, becomes a DataError."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(path, formats=("PNG", "JPEG", "WEBP")) as image:  # Pillow has stranger ones
                return use(image)
    except FileNotFoundError:
        raise DataError(f"{path}: no such file") from None
    except Exception as error:  # noqa: BLE001
        raise DataError(f"{path}: not a readable image ({_reason(error)})") from None


def _reason(error):
    return getattr(error, "strerror", None) or " ".join(str(error).split()) or type(error).__name__


def write_whole(path, aside, *parts):
    """Write bytes so that `path` holds what it held or all of the new: into `aside`, flushed, renamed."""
    try:
        with open(aside, "wb") as file:
            file.writelines(parts)
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, path)
    except OSError:
        Path(aside).unlink(missing_ok=True)
        raise


def _find(folder, pattern):
    """Sorted files under `folder`; symbolic links are followed. Raises DataError where there are none."""
    if not folder.is_dir():
        there = next(parent for parent in folder.absolute().parents if parent.is_dir())
        raise DataError(
            f"{folder}: no such folder ({there} exists and holds {sorted(os.listdir(there))[:6]})"
        )
    files = sorted(folder.glob(pattern))
    if not files:
        raise DataError(f"{folder}: no file {pattern} in it")
    return files


def _walk(folder, ending):
    """Files below `folder`, through symbolic links too; a loop of links is walked once."""
    seen = set()
    for here, folders, files in os.walk(folder, followlinks=True):
        if os.path.realpath(here) in seen:
            folders.clear()
        else:
            seen.add(os.path.realpath(here))
            yield from (Path(here, name) for name in files if name.endswith(ending))


def _same_size(first, *others):
    """Raise DataError, naming both files, unless all have the size of the first."""
    width, height = size_of(first)
    for path in others:
        w, h = size_of(path)
        if (w, h) != (width, height):
            raise DataError(f"{path}: {w} x {h}, but {first} is {width} x {height}")


# Where each data set keeps a split, {}: images, their names' ending, labels, the middle of their names.
LAYOUTS = {
    "cityscapes": ("leftImg8bit/{}", "_leftImg8bit.png", "gtFine/{}", "_gtFine"),
    "darkzurich": ("rgb_anon/{}/night", "_rgb_anon.png", "gt/{}/night", "_gt"),
    "acdc": ("rgb_anon/night/{}", "_rgb_anon.png", "gt/night/{}", "_gt"),
    "nighttime-driving": (
        "leftImg8bit/{}/night", "_leftImg8bit.png", "gtCoarse_daytime_trainvaltest/{}/night", "_gtCoarse",
    ),
}  # fmt: skip
PICTURES = {".png", ".jpg", ".jpeg", ".webp"}
Sample = collections.namedtuple("Sample", "image label invalid", defaults=(None, None))


def samples(layout, root, split="val", labels="labelTrainIds"):
    """[Sample] of paths of a split, checked for counterparts and sizes; label and invalid (gt_invIds) are
    None where the data set has none for the split. `labels`: the kind that is read where a folder holds both.
    The days of *_ref splits have no labels. Raises DataError."""
    folder, ending, gt_folder, middle = LAYOUTS[layout]
    reference = split.endswith("_ref")
    if reference and layout == "darkzurich":
        folder = "rgb_anon/{}/day"
    elif reference:
        ending = "_rgb_ref_anon.png"
    folder, gt_folder = Path(root, folder.format(split)), Path(root, gt_folder.format(split))
    found = []
    for image in _find(folder, f"*{ending}" if layout == "nighttime-driving" else f"*/*{ending}"):
        stem = gt_folder / image.relative_to(folder).parent / (image.name.removesuffix(ending) + middle)
        label = invalid = None
        if gt_folder.is_dir() and not reference:
            kinds = sorted(TABLES, key=lambda kind: kind != labels)  # the wanted one first
            paths = (stem.with_name(f"{stem.name}_{kind}.png") for kind in kinds)
            label = next((path for path in paths if path.is_file()), None)
            if label is None:
                raise DataError(f"{stem}_labelIds.png: no such label (nor {stem.name}_labelTrainIds.png)")
            invalid = stem.with_name(f"{stem.name}_invIds.png")
            invalid = invalid if invalid.is_file() else None
        _same_size(*filter(None, (image, label, invalid)))
        found.append(Sample(image, label, invalid))
    return found


def describe(found, root):
    """What `samples` found and where, as one line for the log."""
    if not found[0].label:
        return f"{len(found)} images, no labels, in {root}"
    kinds = collections.Counter(sample.label.stem.rpartition("_")[2] for sample in found)
    kind, label = next(iter(kinds)), found[0].label
    other = next(name for name in TABLES if name != kind)
    both = label.with_name(label.name.replace(kind, other)).is_file()
    also = f" ({other} are there too: --labels {other} reads them)" if both else ""
    return f"{len(found)} images, {', '.join(f'{n} {name}' for name, n in kinds.items())}{also}, in {root}"


def pictures(paths):
    """[Sample] of picture files, and of the pictures in folders. Raises DataError."""
    found = []
    for path in map(Path, paths):
        files = sorted(p for p in path.iterdir() if p.suffix.lower() in PICTURES) if path.is_dir() else [path]
        if not files:
            raise DataError(f"{path}: no picture in it ({', '.join(sorted(PICTURES))})")
        found += files
    names = collections.Counter(path.stem for path in found)
    if twice := [path for path in found if names[path.stem] > 1]:
        raise DataError(
            f"{twice[0]}: another picture has the same name {twice[0].stem}, one would overwrite the other"
        )
    for path in found:
        size_of(path)
    return [Sample(path) for path in found]


def synthetic_nights(root, source):
    """Ready-made S_n for the `source` samples: the same tree and names as leftImg8bit, under `root`."""
    root = Path(root, "leftImg8bit") if Path(root, "leftImg8bit").is_dir() else Path(root)
    nights = [root.joinpath(*sample.image.parts[-3:]) for sample in source]
    for sample, night in zip(source, nights, strict=True):
        _same_size(sample.image, night)
    return nights


def targets(layout, root, pairs="corresp"):
    """(day images, night images) of "darkzurich" or "acdc" train. No label is read: Dark Zurich has no
    gt/train.

    pairs: "corresp": element i of both lists shows the same place, by Dark Zurich's corresp/train/night/**/
    *_ref_day.csv or ACDC's names; the path of a csv of that form (Dark Zurich only); or "none": all days and
    all nights, unrelated. Raises DataError.
    """
    images = Path(root, "rgb_anon")
    if layout == "acdc":
        nights = _find(images / "night/train", "*/*_rgb_anon.png")
        ref = images / "night/train_ref"
        days = [ref / n.parent.name / n.name.replace("_rgb_anon.png", "_rgb_ref_anon.png") for n in nights]
        if pairs == "none":
            days = _find(ref, "*/*_rgb_ref_anon.png")
    elif pairs == "none":
        days, nights = (_find(images / "train" / light, "*/*_rgb_anon.png") for light in ("day", "night"))
    else:
        folder = Path(root, "corresp", "train", "night")
        tables = sorted(_walk(folder, "_ref_day.csv")) if pairs == "corresp" else [Path(pairs)]
        if not tables:
            raise DataError(f"{folder}: no *_ref_day.csv in it; give --pairs FILE, or --pairs none")
        found = [pair for table in tables for pair in _read_pairs(table, images)]
        if not found:
            raise DataError(f"{tables[0]}: no pair in it")
        nights, days = zip(*found, strict=True)
    if pairs != "none":
        for pair in zip(nights, days, strict=True):
            _same_size(*pair)
    return list(days), list(nights)


def _read_pairs(table, images):
    """Yield (night, day) paths of one csv of NIGHT,DAY lines: stems relative to `images`, which they may not
    leave."""
    try:
        rows = list(csv.reader(table.read_text("utf-8-sig").splitlines()))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{table}: not a readable csv ({_reason(error)})") from None
    for number, row in enumerate(rows, 1):
        stems = [cell.strip() for cell in row]
        if not any(stems):
            continue
        if len(stems) != 2 or not all(stem.isprintable() and stem for stem in stems):
            raise DataError(f"{table}: line {number} is not NIGHT,DAY but {','.join(row)!r}")
        if any(Path(stem).is_absolute() or ".." in Path(stem).parts for stem in stems):
            raise DataError(f"{table}: line {number} leads out of {images}: {','.join(row)!r}")
        yield tuple(images / f"{stem.removesuffix('_rgb_anon.png')}_rgb_anon.png" for stem in stems)


# ---- tensors -----------------------------------------------------------------------------------------------


def load(sample):
    """Sample -> dict of name (the file's stem), image (3, H, W), label (H, W) trainIds and invalid (H, W) 0
    or 1, all uint8; the last two only where the sample has them."""
    item = {"name": Path(sample.image).stem, "image": TF.pil_to_tensor(open_image(sample.image))}
    if sample.label:
        item["label"] = TF.pil_to_tensor(open_label(sample.label))[0]
    if sample.invalid:
        item["invalid"] = TF.pil_to_tensor(open_label(sample.invalid, "invIds"))[0]
    return item


class Cache:
    """Decoded images below `folder`, resized by `factor` (at most 1): raw pixels that are mapped into memory.

    An entry belongs to its source's path, size and time and to the factor; a changed file gets a new one. It
    is written aside and renamed, so that several processes may fill the folder and no part of one counts.
    Where it cannot be written (disk full), one line says so and decoding goes on without.
    """

    HEADER = struct.Struct("<3I")  # height, width, bytes a pixel

    def __init__(self, folder, factor=1.0):
        self.folder, self.factor = Path(folder), min(1.0, factor)
        self.folder.mkdir(parents=True, exist_ok=True)
        self.off = torch.zeros(1, dtype=torch.bool).share_memory_()  # for all loader workers

    def open(self, path, decode):
        """decode(path), a Pillow image, or the same as a (C, H, W) uint8 tensor that lies in the cache."""
        try:
            found = os.stat(path)
        except OSError as error:
            raise DataError(f"{path}: {'no such file' if error.errno == 2 else error.strerror}") from None
        key = f"1 {os.path.abspath(path)} {found.st_size} {found.st_mtime_ns} {self.factor}"
        entry = self.folder / hashlib.sha256(os.fsencode(key)).hexdigest()
        image = self.mapped(entry)
        if image is None:
            image = decode(path)
            size = [max(1, round(side * self.factor)) for side in image.size]
            image = image.resize(size, Image.NEAREST if image.mode == "L" else Image.BILINEAR)
            if not self.off:
                self.write(entry, image)
        return image

    def mapped(self, entry):
        """What an entry holds, None where there is no whole one."""
        try:
            size = entry.stat().st_size
            memory = torch.from_file(str(entry), size=size, dtype=torch.uint8)
            height, width, depth = self.HEADER.unpack(bytes(memory[: self.HEADER.size]))
        except (OSError, RuntimeError, struct.error):
            return None
        if size != self.HEADER.size + height * width * depth:
            return None
        return memory[self.HEADER.size :].view(height, width, depth).permute(2, 0, 1)

    def write(self, entry, image):
        header = self.HEADER.pack(image.height, image.width, len(image.getbands()))
        try:
            write_whole(entry, f"{entry}.{uuid.uuid4().hex}.tmp", header, image.tobytes())
        except OSError as error:
            if not self.off:
                self.off[0] = True
                print(
                    f"{entry}: not written ({error.strerror}); going on without filling the cache", flush=True
                )


class FourDomains(torch.utils.data.Dataset):
    """The training stream: item k holds source_day, source_label, target_day, target_night and, where
    `synthetic` paths are given, source_night; uint8, all `crop` = (H, W); and broken, what was wrong with
    files left out.

    Everything random about item k comes from (seed, k) alone, k counting samples from the first step on:
    loader workers and resumed runs see the same items. source: [Sample]; days, nights: paths, paired if
    `paired`. scale: range of the resizing before the crop. cache: a Cache; its factor
    counts as part of `scale`.
    """

    def __init__(self, source, days, nights, crop, paired=True, synthetic=None, scale=(0.5, 1.0), seed=0,
                  length=1, cache=None):  # fmt: skip
        self.source, self.days, self.nights, self.synthetic = source, days, nights, synthetic
        self.crop, self.paired, self.scale = crop, paired, scale
        self.seed, self.length, self.cache = seed, length, cache

    def __len__(self):
        return self.length

    def __getitem__(self, k):
        broken = []
        for attempt in range(10):  # a broken file is left out: another sample stands in, the item says so
            try:
                return self.item(k, attempt) | {"broken": "\n".join(broken)}
            except DataError as error:
                broken.append(str(error))
        raise DataError(f"{broken[0]} (and 9 more in a row)")

    def item(self, k, attempt=0):
        rng = random.Random(f"{self.seed} {k} {attempt}")

        def pick(domain, files):  # a new order for every pass over the files; a stand-in is any of them
            order = _order(len(files), f"{self.seed} {domain} {k // len(files)}")
            return rng.randrange(len(files)) if attempt else order[k % len(files)]

        def opened(path, decode=open_image):
            return self.cache.open(path, decode) if self.cache else decode(path)

        scale = [limit / (self.cache.factor if self.cache else 1) for limit in self.scale]
        n = pick("source", self.source)
        image, label = opened(self.source[n].image), opened(self.source[n].label, open_label)
        cut = random_crop(TF.get_size(image), self.crop, scale, rng)
        item = {"source_day": cut(image), "source_label": cut(label, TF.InterpolationMode.NEAREST_EXACT)[0]}
        if self.synthetic:
            item["source_night"] = cut(opened(self.synthetic[n]))
        if self.nights:
            n = pick("night", self.nights)
            night = opened(self.nights[n])
            day = opened(self.days[n if self.paired else pick("day", self.days)])
            cut = random_crop(TF.get_size(night), self.crop, scale, rng)
            item["target_night"] = cut(night)
            if not self.paired:
                cut = random_crop(TF.get_size(day), self.crop, scale, rng)
            item["target_day"] = cut(day)
        return item


@functools.lru_cache(maxsize=8)
def _order(length, key):
    return random.Random(key).sample(range(length), length)


def random_crop(size, crop, scale, rng):
    """Draw one random scale, crop and flip for images of `size` (height, width); returns the function that
    applies them to a Pillow image or a (C, H, W) uint8 tensor and gives such a tensor, so that whatever
    belongs together is cut alike."""
    (height, width), (crop_height, crop_width) = size, crop
    least = max(crop_height / height, crop_width / width)  # smaller, and the crop would not be filled
    factor = rng.uniform(max(scale[0], least), max(scale[1], least))
    box_height = min(max(1, round(crop_height / factor)), height)
    box_width = min(max(1, round(crop_width / factor)), width)
    top, left = rng.randint(0, height - box_height), rng.randint(0, width - box_width)
    flip = rng.random() < 0.5

    def cut(image, mode=TF.InterpolationMode.BILINEAR):
        if TF.get_size(image) != [height, width]:
            h, w = TF.get_size(image)
            raise DataError(f"expected an image of {width} x {height}, found {w} x {h}")
        part = TF.to_image(TF.crop(image, top, left, box_height, box_width))[None]
        # Resized as it lies in memory, pixel by pixel: torch's fast path, with Pillow's values.
        part = TF.resize(part.contiguous(memory_format=torch.channels_last), crop, mode)[0]
        return part.flip(-1) if flip else part

    return cut


# ---- the demo city -----------------------------------------------------------------------------------------

DEMO_SIZE = (256, 128)
# Palettes (trainId -> base colour) and cameras of the two cities: they differ as data sets do.
DEMO_PALETTES = {
    "source": {0: (105, 103, 106), 1: (160, 150, 150), 2: (150, 140, 128),
               3: (120, 118, 112), 8: (72, 105, 55), 9: (120, 145, 80),
               10: (190, 212, 232), 11: (130, 60, 60), 13: (60, 80, 140)},
    "target": {0: (86, 84, 80), 1: (128, 122, 110), 2: (158, 112, 88),
               3: (140, 130, 110), 8: (95, 108, 45), 9: (128, 128, 66),
               10: (208, 214, 216), 11: (70, 70, 105), 13: (130, 50, 45)},
}  # fmt: skip
DEMO_HORIZON = {"source": 0.42, "target": 0.5}


def draw_street(city, place, moment):
    """Draw a street of the demo `city` ("source" or "target"): `place` fixes what stands still, `moment` what
    moves. Returns (RGB image by even daylight, trainId label, lights), lights being [(x, y, radius,
    colour)]."""
    width, height = DEMO_SIZE
    rng, palette = random.Random(f"{city} {place}"), DEMO_PALETTES[city]
    image, label = Image.new("RGB", DEMO_SIZE), Image.new("L", DEMO_SIZE, IGNORE)
    canvas, ids = ImageDraw.Draw(image), ImageDraw.Draw(label)
    lights = []

    def paint(train_id, shape, xy, colour=None, spread=14):
        colour = colour or palette[train_id]
        getattr(canvas, shape)(xy, fill=tuple(int(c + rng.uniform(-spread, spread)) for c in colour))
        getattr(ids, shape)(xy, fill=train_id)

    horizon = int(height * (DEMO_HORIZON[city] + rng.uniform(-0.04, 0.04)))
    vanish = width * rng.uniform(0.4, 0.6)
    paint(10, "rectangle", (0, 0, width, horizon))
    x = -10
    while x < width:  # the skyline: houses with windows, walls, trees
        w, kind = rng.randint(18, 46), rng.choice((2, 2, 2, 8, 8, 3))
        top = horizon - (rng.randint(6, 12) if kind == 3 else rng.randint(14, horizon - 4))
        far = abs(x + w / 2 - vanish) < 22
        if kind == 8:
            for _ in range(9):
                cx, cy, r = x + rng.uniform(0, w), rng.uniform(top, horizon), rng.uniform(5, 11)
                paint(8, "ellipse", (cx - r, cy - r, cx + r, cy + r))
            paint(8, "rectangle", (x + 2, (top + horizon) // 2, x + w - 2, horizon + 2))
        elif not far:
            paint(kind, "rectangle", (x, top, x + w, horizon + 2))
            for wx in range(x + 4, x + w - 5, 8) if kind == 2 else ():
                for wy in range(top + 4, horizon - 8, 10):
                    canvas.rectangle((wx, wy, wx + 3, wy + 5), fill=tuple(c - 50 for c in palette[2]))
                    if rng.random() < 0.25:
                        lights.append((wx + 2, wy + 3, 3, (1.0, 0.8, 0.45)))
        x += w + rng.randint(-4, 6)
    paint(9, "rectangle", (0, horizon, width, height))
    left, right = vanish - width * rng.uniform(0.7, 1.1), vanish + width * rng.uniform(0.7, 1.1)
    walk = width * rng.uniform(0.12, 0.3)
    near = (vanish - 3, vanish + 3)
    paint(
        1,
        "polygon",
        [(near[0] - 5, horizon), (near[1] + 5, horizon), (right + walk, height), (left - walk, height)],
    )
    paint(0, "polygon", [(near[0], horizon), (near[1], horizon), (right, height), (left, height)])
    for t in (0.08, 0.2, 0.4, 0.7):  # lane markings are road
        y, s, w = horizon + t * (height - horizon), 3 * t, 4.2 * t
        corners = [(vanish - s, y), (vanish + s, y), (vanish + w, y + 9 * t), (vanish - w, y + 9 * t)]
        canvas.polygon(corners, fill=(205, 205, 200))
    for side in (-1, 1):  # lamp posts and signs along the kerb
        for t in (0.12, 0.3, 0.62):
            x = vanish + side * (6 + t * (right - vanish) * rng.uniform(0.95, 1.2))
            y, h = horizon + t * (height - horizon), 12 + 75 * t
            if rng.random() < 0.75:
                paint(5, "rectangle", (x, y - h, x + 1 + 3 * t, y), (98, 98, 100))
                if rng.random() < 0.7:
                    lights.append((x - side * 6 * t, y - h, 18 + 45 * t, (1.0, 0.72, 0.38)))
                else:
                    sign = (x - 3 - 4 * t, y - h, x + 4 + 5 * t, y - h + 6 + 9 * t)
                    paint(7, "rectangle", sign, (215, 190, 40))
    rng = random.Random(f"{city} {place} {moment}")  # from here on, what moves
    for _ in range(rng.randint(1, 4)):
        t, lane = rng.uniform(0.1, 0.75), rng.choice((-0.45, 0.45, -0.8, 0.8))
        x, y, s = vanish + lane * t * (right - vanish), horizon + t * (height - horizon), 5 + 30 * t
        base = rng.choice((palette[13], (190, 190, 195), (45, 45, 50)))
        paint(13, "rectangle", (x - s, y - s * 0.7, x + s, y), base)
        paint(13, "rectangle", (x - s * 0.7, y - s * 1.2, x + s * 0.7, y - s * 0.6), base)
        canvas.rectangle((x - s * 0.6, y - s * 1.1, x + s * 0.6, y - s * 0.75), fill=(40, 48, 55))
        colour = (1.0, 0.95, 0.8) if lane < 0 else (0.9, 0.1, 0.05)
        lights += [(x + side * s * 0.7, y - s * 0.4, 5 + 14 * t, colour) for side in (-1, 1)]
    for _ in range(rng.randint(0, 4)):
        t, side = rng.uniform(0.12, 0.6), rng.choice((-1, 1))
        x, y, h = (
            vanish + side * (8 + t * (right - vanish) * 1.15),
            horizon + t * (height - horizon),
            8 + 42 * t,
        )
        paint(11, "rectangle", (x - h / 8, y - h * 0.8, x + h / 8, y), spread=40)
        paint(11, "ellipse", (x - h / 11, y - h, x + h / 11, y - h * 0.8), (190, 150, 125))
    return image, label, lights


def photograph(image, lights, city, night, key):
    """Photograph a drawn street: sun by day; by night darkness, lamps with glare, and a noisy, soft
    sensor."""
    rng = random.Random(f"camera {city} {key}")
    generator = torch.Generator().manual_seed(rng.getrandbits(32))
    width, height = DEMO_SIZE
    soft = image.filter(ImageFilter.GaussianBlur((0.5 if city == "source" else 0.8) + 0.3 * night))
    scene = TF.pil_to_tensor(soft).float() / 255
    y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    if night:
        ambient = torch.tensor([0.20, 0.21, 0.26]).view(3, 1, 1) * rng.uniform(0.7, 1.1)
        light, glare = ambient.expand(3, height, width).clone(), torch.zeros(3, height, width)
        for lx, ly, radius, colour in lights:
            square = ((x - lx) ** 2 + (y - ly) ** 2) / radius**2
            colour = torch.tensor(colour).view(3, 1, 1)
            light += 0.2 * colour * torch.exp(-square)  # falls on what is near
            # and reaches the lens itself
            glare += colour * (torch.exp(-square * 60) + 0.03 * torch.exp(-square * 4))
        glow = torch.exp(-(((y / height - 0.35) / 0.25) ** 2))  # of the city, on the sky above the horizon
        glow = glow * torch.tensor([0.07, 0.06, 0.06]).view(3, 1, 1) * rng.uniform(0.5, 1)
        scene = scene * light + glare + glow
        noise = 0.01
    else:
        noise, haze = 0.012, rng.uniform(0, 0.15)
        scene = scene * rng.uniform(0.75, 1.1) * (1 - haze) + haze * 0.8
    if city == "target":  # a warmer, flatter camera with a darker rim
        rim = 1 - 0.35 * (((x - width / 2) / width) ** 2 + ((y - height / 2) / height) ** 2)
        scene = (scene * torch.tensor([1.06, 1.0, 0.88]).view(3, 1, 1) * rim).clamp(min=0) ** 0.9
    scene = scene + noise * torch.randn(scene.shape, generator=generator)
    return TF.to_pil_image((scene.clamp(0, 1) * 255).to(torch.uint8))


def make_demo_city(root, train=160, val=24):
    """Write the demo city: ROOT/cityscapes (labelled source days) and ROOT/darkzurich (unlabelled target days
    and nights with a true pair list; labelled val nights), in the layouts of the real ones. Always the same
    pixels."""
    root = Path(root)

    def save(image, *parts):
        path = root.joinpath(*parts)
        path.parent.mkdir(parents=True, exist_ok=True)
        image.save(path)

    label_ids = [label_id for _, label_id, _ in CLASSES] + [0] * (256 - len(CLASSES))
    for split, count in (("train", train), ("val", val)):
        for n in range(count):
            image, label, lights = draw_street("source", f"{split} {n}", "day")
            name = f"demo_{n:06d}_000000"
            day = photograph(image, lights, "source", False, f"{split} {n}")
            save(day, "cityscapes/leftImg8bit", split, "demo", f"{name}_leftImg8bit.png")
            save(label.point(label_ids), "cityscapes/gtFine", split, "demo", f"{name}_gtFine_labelIds.png")
    pairs = []
    for n in range(train):
        stems = (
            f"train/night/DEMO_night/DEMO_night_frame_{n:06d}",
            f"train/day/DEMO_day/DEMO_day_frame_{n:06d}",
        )
        for stem, light in zip(stems, ("night", "day"), strict=True):
            image, _, lights = draw_street("target", f"train {n}", light)
            photo = photograph(image, lights, "target", light == "night", f"{light} {n}")
            save(photo, "darkzurich/rgb_anon", f"{stem}_rgb_anon.png")
        pairs.append(",".join(stems))
    for n in range(val):
        image, label, lights = draw_street("target", f"val {n}", "night")
        name = f"DEMO_val_frame_{n:06d}"
        photo = photograph(image, lights, "target", True, f"val {n}")
        save(photo, "darkzurich/rgb_anon/val/night/DEMO_val", f"{name}_rgb_anon.png")
        save(label, "darkzurich/gt/val/night/DEMO_val", f"{name}_gt_labelTrainIds.png")
    table = root / "darkzurich/corresp/train/night/DEMO_night/DEMO_night_ref_day.csv"
    table.parent.mkdir(parents=True, exist_ok=True)
    table.write_text("\n".join(pairs) + "\n")
