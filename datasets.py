"""Files in, tensors out: Cityscapes, Dark Zurich, ACDC, Nighttime Driving, and a demo city drawn in the same
layouts. Knows no model.

    source = samples("cityscapes", root, "train")              [Sample(image, label)], paths
    days, nights = targets("darkzurich", root)                 paths, element i of both shows one place
    stream = FourDomains(source, days, nights, crop=(512, 512), length=1000)     a torch Dataset

Images are (3, H, W) uint8 RGB, labels as (H, W) uint8 trainIds with 255 = ignore. What is wrong with a
file raises DataError, whose one line names the file and what was expected. Names that begin with a dot are
never data.
"""

import collections
import concurrent.futures
import contextlib
import csv
import functools
import hashlib
import itertools
import os
import random
import re
import threading
import time
import uuid
import warnings
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFilter, ImageOps, UnidentifiedImageError
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
NAMES, LABEL_IDS, COLOURS = map(list, zip(*CLASSES, strict=True))
# Stored value -> trainId; None: no such label exists, the file is wrong.
TABLES = {
    "labelIds": [LABEL_IDS.index(v) if v in LABEL_IDS else IGNORE if v < 34 else None for v in range(255)],
    "labelTrainIds": [v if v < len(CLASSES) else None for v in range(255)],
}
TABLES = {kind: [*table, IGNORE] for kind, table in TABLES.items()}
PALETTE = torch.tensor(COLOURS + [(0, 0, 0)] * (256 - len(CLASSES)), dtype=torch.uint8)
# Where each data set keeps a split, {}: images, how their names end, labels, the middle of their names.
LAYOUTS = {
    "cityscapes": ("leftImg8bit/{}", "_leftImg8bit.png", "gtFine/{}", "_gtFine"),
    "darkzurich": ("rgb_anon/{}/night", "_rgb_anon.png", "gt/{}/night", "_gt"),
    "acdc": ("rgb_anon/night/{}", "_rgb_anon.png", "gt/night/{}", "_gt"),
    "nighttime-driving": (
        "leftImg8bit/{}/night", "_leftImg8bit.png", "gtCoarse_daytime_trainvaltest/{}/night", "_gtCoarse",
    ),
}  # fmt: skip
# Target days and nights for training, and how the days' names end.
TARGETS = {
    "darkzurich": ("rgb_anon/train/day", "rgb_anon/train/night", "_rgb_anon.png"),
    "acdc": ("rgb_anon/night/train_ref", "rgb_anon/night/train", "_rgb_ref_anon.png"),
}
PICTURES = (".jpeg", ".jpg", ".png", ".webp")
Sample = collections.namedtuple("Sample", "image label", defaults=(None,))


class DataError(ValueError):
    """A file is missing, unreadable or not what its name promises."""


def samples(layout, root, split="val", labels="labelTrainIds"):
    """[Sample] of paths of a split; label is None where the data set has none for the split (also for the
    days of *_ref splits). `labels`: the kind that is read where a folder holds both. Raises DataError."""
    folder, ending, gt_folder, middle = LAYOUTS[layout]
    reference = split.endswith("_ref")
    if reference:
        folder, ending = folder.replace("{}/night", "{}/day"), TARGETS.get(layout, (ending,))[-1]
    images = _files(find_folder(root, folder.format(split)), ending)
    gt = None if reference else find_folder(root, gt_folder.format(split), must_exist=False)
    if gt is None:
        return [Sample(image) for image in images.values()]
    stored = {}
    for kind in sorted(TABLES, key=lambda kind: kind == labels):  # the wanted one last
        stored |= _files(gt, f"{middle}_{kind}.png", must_exist=False)
    if missing := [name for name in images if name not in stored]:
        raise DataError(f"{gt / missing[0]}{middle}_labelIds.png: no such label (nor _labelTrainIds.png)")
    return [Sample(image, stored[name]) for name, image in images.items()]


def targets(layout, root, pairs="corresp"):
    """(day images, night images) of "darkzurich" or "acdc" train. No label is read: Dark Zurich has no
    gt/train.

    pairs: "corresp": element i of both lists shows the same place, by Dark Zurich's corresp/train/night/**/
    *_ref_day.csv or ACDC's names; the path of a csv of that form (Dark Zurich only); or "none": all days and
    all nights, unrelated. Raises DataError.
    """
    *places, ending = TARGETS[layout]
    day_folder, night_folder = (find_folder(root, place) for place in places)
    days, nights = _files(day_folder, ending), _files(night_folder, "_rgb_anon.png")
    if pairs == "none":
        return list(days.values()), list(nights.values())
    if layout == "acdc":
        if alone := [name for name in nights if name not in days]:
            raise DataError(f"{day_folder / alone[0]}{ending}: no such file")
        return [days[name] for name in nights], list(nights.values())
    tables = [Path(pairs)]
    if pairs == "corresp":
        folder = find_folder(root, "corresp/train/night", must_exist=False)
        tables = list(_files(folder, "_ref_day.csv", must_exist=False).values()) if folder else []
        if not tables:
            missing = f"{Path(root, 'corresp/train/night')}: no *_ref_day.csv there"
            raise DataError(f"{missing}; give --pairs FILE, or --pairs none for unrelated days and nights")
    images = night_folder.parent.parent
    known = {f"train/day/{stem}": path for stem, path in days.items()}
    known |= {f"train/night/{stem}": path for stem, path in nights.items()}
    listed = [pair for table in tables for pair in _read_pairs(table, known, images)]
    if not listed:
        raise DataError(f"{tables[0]}: no pair in it")
    nights, days = map(list, zip(*listed, strict=True))
    return days, nights


def _read_pairs(table, known, images):
    """Yield (night, day) paths of a csv of NIGHT,DAY lines: stems relative to `images`, keys of `known`."""
    try:
        if table.exists() and not table.is_file():
            raise OSError("a folder, a pipe or a device, no file")
        rows = list(csv.reader(table.read_text("utf-8-sig").splitlines()))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{table}: not a readable csv ({_reason(error)})") from None
    for number, row in enumerate(rows, 1):
        stems = [cell.strip().replace("\\", "/").removeprefix("./").removeprefix("rgb_anon/") for cell in row]
        stems = [re.sub(r"(?i)(_rgb_anon)?(\.png)?$", "", stem) for stem in stems]
        if stems[2:] == [""]:
            stems.pop()  # a comma at the end
        if not any(stems) or (number == 1 and len(stems) == 2 and not any("/" in stem for stem in stems)):
            continue  # an empty line, a heading
        if len(stems) != 2 or not all(stem.isprintable() and stem for stem in stems):
            raise DataError(f"{table}: line {number} is not NIGHT,DAY but {','.join(row)!r}")
        if stems[0].startswith("train/day/") and stems[1].startswith("train/night/"):
            stems.reverse()  # a list with the days first
        if not (stems[0].startswith("train/night/") and stems[1].startswith("train/day/")):
            wanted = "train/night/...,train/day/..."
            raise DataError(f"{table}: line {number} is not {wanted} but {','.join(row)!r}")
        if missing := [stem for stem in stems if stem not in known]:
            raise DataError(f"{table}: line {number}: no file {missing[0]}_rgb_anon.png in {images}")
        yield known[stems[0]], known[stems[1]]


def synthetic_nights(root, source):
    """Paths of ready-made S_n for the `source` samples: leftImg8bit's tree and names, under `root`."""
    base = find_folder(root, "leftImg8bit", must_exist=False) or Path(root)
    return [base.joinpath(*sample.image.parts[-3:]) for sample in source]


def pictures(paths):
    """([Sample] of picture files and of the pictures in folders, what is skipped in these folders: other
    formats, subfolders). Raises DataError."""
    read, skipped = [], []
    for path in map(Path, paths):
        if not path.exists():
            raise DataError(f"{path}: no such file")
        inside = sorted(p for p in path.iterdir() if not p.name.startswith(".")) if path.is_dir() else [path]
        files = [p for p in inside if p == path or (p.suffix.lower() in PICTURES and not p.is_dir())]
        if not files:
            raise DataError(f"{path}: no picture in it ({', '.join(PICTURES)})")
        read += [Sample(file) for file in files]
        skipped += [p for p in inside if p not in files]
    return read, skipped


def describe(samples, root):
    """How many images there are, with which labels and where, as one line."""
    kind = samples[0].label.stem.rpartition("_")[2] if samples[0].label else "no labels"
    return f"{len(samples)} images, {kind}, in {root}"


def check_sizes(groups, crop=None, say=print):
    """Read every image header once; say how far it is. groups: tuples of paths of images that must be of one
    size. crop: (H, W) that must fit in. Raises DataError."""
    sizes, reported = {}, time.monotonic()
    for number, group in enumerate(groups, 1):
        for path in group:
            sizes[path] = sizes.get(path) or size_of(path)
            (width, height), (w, h) = sizes[group[0]], sizes[path]
            if (w, h) != (width, height):
                raise DataError(f"{path}: {w} x {h}, but {group[0]} is {width} x {height}")
        if crop and (height < crop[0] or width < crop[1]):
            small = f"{width} x {height} (width x height) is smaller than --crop {crop[0]} {crop[1]}"
            raise DataError(f"{group[0]}: {small}; give a smaller one")
        if time.monotonic() - reported > 3:
            reported = time.monotonic()
            say(f"reading image headers: {number} of {len(groups)}")


def label_warning(samples):
    """Read some 30 labels, spread over a split. Returns what is odd about them as one line, or None. Raises
    DataError on an impossible value."""
    spread, small, void = samples[:: -(-len(samples) // 30)], [], 0
    for sample in spread:
        image, kind = _stored_label(sample.label)
        values = [value for value, count in enumerate(image.histogram()[:IGNORE]) if count]
        void += open_label(sample.label).getextrema()[0] == IGNORE
        if kind == "labelIds" and max(values, default=0) < len(CLASSES):
            small.append(sample.label)
    what = f"warning: {samples[0].label.parent.parent}: of {len(spread)} labels looked at"
    if void == len(spread):
        return f"{what}, every pixel is void (ignored)"
    if small:
        way_out = "trainIds? Then name them _labelTrainIds.png"
        return f"{what}, {len(small)} are named labelIds and hold no value above 18 ({small[0]}): {way_out}"
    return None


def find_folder(root, name, must_exist=True):
    """ROOT/name, or the one ROOT/*/name there is (zips unpacked side by side); None if there is none and it
    need not exist. Raises DataError."""
    root = Path(root)
    if (root / name).is_dir():
        return root / name
    inside = sorted(root.glob(f"[!.]*/{name}"))
    inside = [path for path in inside if path.is_dir() and "__MACOSX" not in path.parts]  # a Mac's copy
    if len(inside) > 1:
        raise DataError(f"{root}: {name} is there more than once: {inside[0]}, {inside[1]}; name one of them")
    if not inside and must_exist:
        there = next(path for path in (root / name).absolute().parents if path.is_dir())
        holds = [entry for entry in sorted(os.listdir(there)) if not entry.startswith(".")][:6]
        raise DataError(f"{root / name}: no such folder ({there} exists and holds {holds})")
    return inside[0] if inside else None


def _files(folder, ending, must_exist=True):
    """{path below `folder` without its ending: path}, sorted, through symbolic links (a loop is walked once),
    whatever the case of the ending. Raises DataError where there is none and one must exist."""
    files, seen = {}, set()
    for here, folders, names in os.walk(folder, followlinks=True):
        new = os.path.realpath(here) not in seen
        seen.add(os.path.realpath(here))
        folders[:] = [name for name in folders if new and not name.startswith(".")]
        for name in names if new else ():
            if name.lower().endswith(ending.lower()) and not name.startswith("."):
                path = Path(here, name)
                stem = path.relative_to(folder).as_posix()[: -len(ending)]
                if stem in files:
                    raise DataError(f"{path}: there is also {files[stem].name}; keep one of them")
                files[stem] = path
    if not files and must_exist:
        raise DataError(f"{folder}: no file *{ending} in it")
    return dict(sorted(files.items()))


class FourDomains(torch.utils.data.Dataset):
    """The training stream: item k is a dict of uint8 tensors, all `crop` = (H, W): source_day, source_label,
    target_day, target_night and, where `synthetic` paths are given, source_night.

    Everything random about item k comes from (seed, k) alone, k counting samples from the first step on:
    decoding threads and resumed runs see the same items. source: [Sample]; days, nights: paths, element i of
    both showing one place if `paired`. scale: range of the resizing before the crop. Before item
    `targets_from` no target_day is decoded, and no target_night unless S_n takes its style from it.
    """

    def __init__(self, source, days, nights, crop, paired=True, synthetic=None, scale=(0.5, 1.0), seed=0,
                 length=1, cache=None, targets_from=0):  # fmt: skip
        self.source, self.days, self.nights, self.synthetic = source, days, nights, synthetic
        self.crop, self.paired, self.scale, self.targets_from = crop, paired, scale, targets_from
        self.seed, self.length, self.cache = seed, length, cache

    def __len__(self):
        return self.length

    def __getitem__(self, k):
        if not 0 <= k < self.length:
            raise IndexError(k)  # which also ends a loop over the stream
        rng = random.Random(f"{self.seed} {k} 0")

        def pick(domain, files):  # a new order for every pass over the files
            return _order(len(files), f"{self.seed} {domain} {k // len(files)}")[k % len(files)]

        def opened(path, decode=open_image):
            return self.cache.open(path, decode) if self.cache else decode(path)

        scale = [limit / (self.cache.factor if self.cache else 1) for limit in self.scale]
        n = pick("source", self.source)
        image, label = opened(self.source[n].image), opened(self.source[n].label, open_label)
        cut = random_crop(TF.get_size(image), self.crop, scale, rng)
        item = {"source_day": cut(image), "source_label": cut(label, TF.InterpolationMode.NEAREST_EXACT)[0]}
        if self.synthetic:
            item["source_night"] = cut(opened(self.synthetic[n]))
        joined = k >= self.targets_from
        if self.nights and (joined or not self.synthetic):
            n = pick("night", self.nights)
            night = opened(self.nights[n])
            cut = random_crop(TF.get_size(night), self.crop, scale, rng)
            item["target_night"] = cut(night)
            if joined:
                day = opened(self.days[n if self.paired else pick("day", self.days)])
                cut = cut if self.paired else random_crop(TF.get_size(day), self.crop, scale, rng)
                item["target_day"] = cut(day)
        return item


def ahead(load, items, workers):
    """Yield load(item) of each item, in order, by threads that are `workers` items ahead. Threads
    decode side by side, and need neither shared memory nor processes that could be killed."""
    pool = concurrent.futures.ThreadPoolExecutor(max(1, workers), "", torch.set_num_threads, (1,))
    waiting, items = collections.deque(), iter(items)
    try:
        for item in itertools.islice(items, workers):
            waiting.append(pool.submit(load, item))
        for item in items:
            waiting.append(pool.submit(load, item))
            yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


@functools.lru_cache(maxsize=8)
def _order(length, key):
    return random.Random(key).sample(range(length), length)


def random_crop(size, crop, scale, rng):
    """Draw one random scale, crop and flip for images of `size` (height, width). Returns the function that
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
            raise DataError(f"expected height and width {height, width}, not {TF.get_size(image)}")
        part = TF.to_image(TF.crop(image, top, left, box_height, box_width))[None]
        # Resized as it lies in memory, pixel by pixel: torch's fast path, with Pillow's values.
        part = TF.resize(part.contiguous(memory_format=torch.channels_last), crop, mode)[0]
        return part.flip(-1) if flip else part

    return cut


class Cache:
    """Decoded images as torch files below `folder`, resized by `factor` (at most 1) and mapped into memory.

    An entry belongs to its source's path, size and time and to the factor; a changed file gets a new one.
    Several processes may fill one folder. Where it cannot be written (disk full), decoding goes on without.
    """

    def __init__(self, folder, factor=1.0):
        self.folder, self.factor, self.full = Path(folder), min(1.0, factor), False
        self.folder.mkdir(parents=True, exist_ok=True)

    def open(self, path, decode):
        """decode(path), a Pillow image, as a (C, H, W) uint8 tensor. Raises DataError."""
        stat = os.stat(path) if os.path.exists(path) else None
        key = f"2 {os.path.abspath(path)} {stat and (stat.st_size, stat.st_mtime_ns)} {self.factor}"
        entry = self.folder / f"{hashlib.sha256(os.fsencode(key)).hexdigest()}.pt"
        try:
            return torch.load(entry, mmap=True, weights_only=True)
        except Exception:  # noqa: BLE001 (missing, or damaged in one of many ways)
            image = decode(path)
        size = [max(1, round(side * self.factor)) for side in image.size]
        image = image.resize(size, Image.NEAREST if image.mode == "L" else Image.BILINEAR)
        image = TF.pil_to_tensor(image)
        try:
            if not self.full:
                write_whole(entry, lambda file: torch.save(image, file))
        except (OSError, RuntimeError) as error:
            self.full = True
            warnings.warn(f"{_reason(error)}; the cache is not filled further", stacklevel=2)
        return image


def load(sample):
    """Sample -> dict of name (the file's stem), image (3, H, W) and, where the sample has one, label (H, W)
    trainIds, all uint8. Raises DataError."""
    item = {"name": Path(sample.image).stem, "image": TF.pil_to_tensor(open_image(sample.image))}
    return item | ({"label": TF.pil_to_tensor(open_label(sample.label))[0]} if sample.label else {})


def colourise(labels):
    """(..., H, W) trainIds -> (..., 3, H, W) uint8 in the Cityscapes colours, ignore in black."""
    return PALETTE[labels.long().cpu()].movedim(-1, -3)


def size_of(path):
    """(width, height) as `open_image` gives it, from the header alone where that tells. Raises DataError."""
    return _opened(path, decode=False).size


def open_image(path):
    """Decoded RGB Pillow image. Raises DataError."""
    image = _opened(path)
    if image.mode not in ("RGB", "RGBA", "P", "L", "LA", "1"):
        raise DataError(f"{path}: expected an 8-bit RGB image, found mode {image.mode}")
    return image.convert("RGB")


def open_label(path):
    """Decoded label as a Pillow image of trainIds. The file's name says whether it stores labelIds or
    labelTrainIds; its values are checked. Raises DataError."""
    image, kind = _stored_label(path)
    wrong = [v for v, count in enumerate(image.histogram()) if count and TABLES[kind][v] is None]
    if wrong:
        known = {"labelIds": "0-33, 255", "labelTrainIds": "0-18, 255"}[kind]
        raise DataError(f"{path}: value {wrong[0]} is no {kind} value ({known})")
    return image.point([IGNORE if value is None else value for value in TABLES[kind]])


def _stored_label(path):
    """(Pillow image of the stored values, their kind)."""
    kind = "labelTrainIds" if Path(path).stem.lower().endswith("labeltrainids") else "labelIds"
    image = _opened(path)
    if image.format != "PNG":
        raise DataError(f"{path}: labels are PNG, and this is {image.format}, which changes values")
    with open(path, "rb") as file:
        depth = file.read(25)[24]  # where a PNG says it; Pillow spreads 4-bit greys over 0 to 255
    if image.mode not in ("L", "P") or (image.mode == "L" and depth != 8):
        stored = f"mode {image.mode}, {depth} bits"
        raise DataError(f"{path}: expected an 8-bit single-channel label, found {stored}")
    if image.mode == "P":
        if _palette_contradicts(image, TABLES[kind]):
            way_out = f"save the {kind} themselves, as 8-bit grey"
            raise DataError(f"{path}: its palette says that its indices are no {kind}; {way_out}")
        image = Image.frombytes("L", image.size, image.tobytes())
    return image, kind


def _palette_contradicts(image, table):
    """Does a palette show that the indices are not the labels? A palette may colour them (as VOC does, or
    with the Cityscapes colours); an image optimiser or a quantiser leaves the true values as its colours."""
    palette = image.getpalette()
    used = {v: tuple(palette[3 * v : 3 * v + 3]) for v, n in enumerate(image.histogram()) if n and v < IGNORE}
    if all(len({*colour}) == 1 for colour in used.values()):  # all grey
        return len({*used.values()}) == len(used) and any(value != grey[0] for value, grey in used.items())

    def voc(value):  # the colour map of PASCAL VOC: the value's bits, dealt out to red, green, blue
        return tuple(sum((value >> 3 * j + c & 1) << 7 - j for j in range(3)) for c in range(3))

    if {*used.values()} <= {voc(value) for value in range(256)}:
        return any(colour != voc(value) for value, colour in used.items())
    # id 18, polegroup, is void and has the colour of pole
    known = {v: COLOURS.index(colour) for v, colour in used.items() if colour in COLOURS and v != 18}
    return any(table[value] != train_id for value, train_id in known.items())


_OPENING = threading.Lock()  # warning filters are the whole process's


def _opened(path, decode=True):
    """A Pillow image, decoded or its header alone; what Pillow raises, a dozen types on damaged files,
    becomes a DataError. A phone's picture is turned as people see it; PNGs, like labels, stay as stored."""
    try:
        if os.path.exists(path) and not os.path.isfile(path):
            raise OSError("a folder, a pipe or a device, no file")
        with _OPENING, warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            image = Image.open(path, formats=("PNG", "JPEG", "WEBP"))  # Pillow has stranger ones
        with image:
            if decode:
                image.load()
            if image.format != "PNG":
                ImageOps.exif_transpose(image, in_place=True)
            return image
    except FileNotFoundError:
        raise DataError(f"{path}: no such file") from None
    except Exception as error:  # noqa: BLE001
        reason = "no PNG, JPEG or WebP" if isinstance(error, UnidentifiedImageError) else _reason(error)
        reason += "; make it smaller" if "Bomb" in type(error).__name__ else ""
        raise DataError(f"{path}: not a readable image ({reason})") from None


def _reason(error):
    return getattr(error, "strerror", None) or " ".join(str(error).split()) or type(error).__name__


@contextlib.contextmanager
def written(path, otherwise=""):
    """An OSError inside (a full disk, no permission) is raised with the name of the file."""
    try:
        yield
    except OSError as error:
        raise OSError(f"{path}: not written ({_reason(error)}){otherwise}") from None


def write_whole(path, write):
    """write(file) to a file beside `path`, which then takes its place: `path` never holds half of it."""
    aside, there = f"{path}.{uuid.uuid4().hex[:8]}.tmp", os.path.exists(path)
    try:
        with written(path, "; what it held before is still whole" if there else ""):
            if there and not os.path.isfile(path):
                raise OSError("a folder, a pipe or a device is there")
            with open(aside, "wb") as file:
                write(file)
                file.flush()
                os.fsync(file.fileno())
            os.replace(aside, path)
    finally:
        Path(aside).unlink(missing_ok=True)


# ---- the demo city -----------------------------------------------------------------------------------------

DEMO_SIZE = (256, 128)
# trainId -> base colour: the two cities differ as data sets do.
DEMO_COLOURS = {
    "source": {0: (105, 103, 106), 1: (160, 150, 150), 2: (150, 140, 128), 5: (98, 98, 100),
               8: (72, 105, 55), 10: (190, 212, 232), 11: (130, 60, 60), 13: (60, 80, 140)},
    "target": {0: (86, 84, 80), 1: (128, 122, 110), 2: (158, 112, 88), 5: (98, 98, 100),
               8: (95, 108, 45), 10: (208, 214, 216), 11: (70, 70, 105), 13: (130, 50, 45)},
}  # fmt: skip


def make_demo_city(root, train=160, val=24):
    """Write the demo city: ROOT/cityscapes (labelled source days) and ROOT/darkzurich (unlabelled target days
    and nights with a true pair list; labelled val nights), in the layouts of the real ones. Always the same
    pixels."""
    night, day = (f"train/{light}/DEMO_{light}/DEMO_{light}_frame_{{:06d}}" for light in ("night", "day"))
    source, val_name = "demo/demo_{}_000000", "val/night/DEMO_val/DEMO_val_frame_{:06d}"
    image, label = f"leftImg8bit/{{}}/{source}_leftImg8bit", f"gtFine/{{}}/{source}_gtFine_labelIds"
    plan = [  # city, place, count, light, image, label
        ("source", "train", train, "day", image.format("train", "{:06d}"), label.format("train", "{:06d}")),
        ("source", "val", val, "day", image.format("val", "{:06d}"), label.format("val", "{:06d}")),
        ("target", "train", train, "day", f"rgb_anon/{day}_rgb_anon", None),
        ("target", "train", train, "night", f"rgb_anon/{night}_rgb_anon", None),
        ("target", "val", val, "night", f"rgb_anon/{val_name}_rgb_anon", f"gt/{val_name}_gt_labelTrainIds"),
    ]
    for city, place, count, light, image_name, label_name in plan:
        folder = Path(root, "cityscapes" if city == "source" else "darkzurich")
        for n in range(count):
            image, label, lights = draw_street(city, f"{place} {n}", light)
            image = photograph(image, lights, city, light == "night", f"{place} {n} {light}")
            if city == "source":
                label = label.point(LABEL_IDS + [0] * (256 - len(CLASSES)))
            for picture, name in ((image, image_name), (label, label_name)):
                if name:
                    path = folder / f"{name.format(n)}.png"
                    path.parent.mkdir(parents=True, exist_ok=True)
                    picture.save(path)
    table = Path(root, "darkzurich/corresp/train/night/DEMO_night/DEMO_night_ref_day.csv")
    table.parent.mkdir(parents=True, exist_ok=True)  # the last thing to be written: the city is whole
    table.write_text("".join(f"{night.format(n)},{day.format(n)}\n" for n in range(train)))


def draw_street(city, place, moment):
    """Draw a street of `city` ("source" or "target"): `place` fixes what stands still, `moment` what moves.
    Returns (RGB image by even daylight, trainId label, lights), lights being [(x, y, radius, colour)]."""
    width, height = DEMO_SIZE
    rng = random.Random(f"{city} {place}")
    image, label, lights = Image.new("RGB", DEMO_SIZE), Image.new("L", DEMO_SIZE, IGNORE), []

    def paint(train_id, shape, xy, spread=14):
        colour = tuple(int(c + rng.uniform(-spread, spread)) for c in DEMO_COLOURS[city][train_id])
        getattr(ImageDraw.Draw(image), shape)(xy, fill=colour)
        getattr(ImageDraw.Draw(label), shape)(xy, fill=train_id)

    horizon = int(height * ({"source": 0.42, "target": 0.5}[city] + rng.uniform(-0.04, 0.04)))
    vanish, x, depth = width * rng.uniform(0.4, 0.6), -10, height - horizon
    left, right = (vanish + side * width * rng.uniform(0.7, 1.1) for side in (-1, 1))
    walk = width * rng.uniform(0.12, 0.3)
    paint(10, "rectangle", (0, 0, width, horizon))
    while x < width:  # the skyline: trees, and houses with lit windows
        w, top = rng.randint(18, 46), horizon - rng.randint(14, horizon - 4)
        for _ in range(9) if rng.random() < 0.35 else ():
            cx, cy, r = x + rng.uniform(0, w), rng.uniform(top, horizon), rng.uniform(5, 11)
            paint(8, "ellipse", (cx - r, cy - r, cx + r, cy + r))
        if rng.random() < 0.6:
            paint(2, "rectangle", (x, top, x + w, horizon + 2))
            lights += [(x + rng.uniform(3, w - 3), rng.uniform(top, horizon), 3, (1.0, 0.8, 0.45))]
        x += w + rng.randint(-4, 6)
    paint(8, "rectangle", (0, horizon, width, height))
    for train_id, near, far in ((1, walk, 8), (0, 0, 3)):
        bottom = [(right + near, height), (left - near, height)]
        paint(train_id, "polygon", [(vanish - far, horizon), (vanish + far, horizon), *bottom])
    for side, t in ((side, t) for side in (-1, 1) for t in (0.12, 0.3, 0.62)):  # lamp posts along the kerb
        x = vanish + side * (6 + t * (right - vanish) * rng.uniform(0.95, 1.2))
        y, h = horizon + t * depth, 12 + 75 * t
        paint(5, "rectangle", (x, y - h, x + 1 + 3 * t, y))
        lights.append((x - side * 6 * t, y - h, 18 + 45 * t, (1.0, 0.72, 0.38)))
    rng = random.Random(f"{city} {place} {moment}")  # from here on, what moves
    for _ in range(rng.randint(1, 4)):
        t, lane = rng.uniform(0.1, 0.75), rng.choice((-0.8, -0.45, 0.45, 0.8))
        x, y, s = vanish + lane * t * (right - vanish), horizon + t * depth, 5 + 30 * t
        paint(13, "rectangle", (x - s, y - s * 0.7, x + s, y), 50)
        paint(13, "rectangle", (x - s * 0.7, y - s * 1.2, x + s * 0.7, y - s * 0.6), 50)
        colour = (1.0, 0.95, 0.8) if lane < 0 else (0.9, 0.1, 0.05)
        lights += [(x + side * s * 0.7, y - s * 0.4, 5 + 14 * t, colour) for side in (-1, 1)]
    for _ in range(rng.randint(0, 4)):
        t, side = rng.uniform(0.12, 0.6), rng.choice((-1, 1))
        x, y, h = vanish + side * (8 + t * (right - vanish) * 1.15), horizon + t * depth, 8 + 42 * t
        paint(11, "rectangle", (x - h / 8, y - h, x + h / 8, y), 40)
    return image, label, lights


def photograph(image, lights, city, night, key):
    """Photograph a drawn street: by day in the sun; by night in the dark, with lamps, glare and noise."""
    rng = random.Random(f"camera {city} {key}")
    noise = torch.randn(3, *DEMO_SIZE[::-1], generator=torch.Generator().manual_seed(rng.getrandbits(32)))
    blur = ImageFilter.GaussianBlur((0.5 if city == "source" else 0.8) + 0.3 * night)
    scene = TF.pil_to_tensor(image.filter(blur)).float() / 255
    y, x = torch.meshgrid(*(torch.arange(side) for side in DEMO_SIZE[::-1]), indexing="ij")
    if night:
        light = torch.full_like(scene, 0.22 * rng.uniform(0.7, 1.1))
        glare = torch.full_like(scene, 0.03 * rng.uniform(0.5, 1))
        for lx, ly, radius, colour in lights:
            square = ((x - lx) ** 2 + (y - ly) ** 2) / radius**2
            colour = torch.tensor(colour).view(3, 1, 1)
            light += 0.2 * colour * torch.exp(-square)  # falls on what is near, and into the lens
            glare += colour * (torch.exp(-square * 60) + 0.03 * torch.exp(-square * 4))
        scene = scene * light + glare
    else:
        haze = rng.uniform(0, 0.15)
        scene = scene * rng.uniform(0.75, 1.1) * (1 - haze) + haze * 0.8
    if city == "target":  # a warmer, flatter camera
        scene = (scene * torch.tensor([1.06, 1.0, 0.88]).view(3, 1, 1)) ** 0.9
    return TF.to_pil_image(((scene + 0.01 * noise).clamp(0, 1) * 255).to(torch.uint8))
