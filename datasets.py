"""Files in, tensors out: Cityscapes, Dark Zurich, ACDC, Nighttime Driving, and a demo city drawn in the same
layouts. Knows no model.

Images are (3, H, W) uint8 RGB, labels (H, W) uint8 trainIds with 255 = ignore. A bad file raises DataError,
one line that names it. Names that begin with a dot are never data.
"""

import collections
import concurrent.futures
import contextlib
import itertools
import os
import random
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFilter, ImageOps, PngImagePlugin
from torchvision.transforms.v2 import functional as TF

PngImagePlugin.MAX_TEXT_CHUNK = PngImagePlugin.MAX_TEXT_MEMORY = 2**30  # long texts and profiles are no fault
IGNORE = 255
# The official table: name, labelId, colour. The trainId is the place in this list.
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
PALETTE = torch.tensor(COLOURS + [(0, 0, 0)] * (256 - len(CLASSES)), dtype=torch.uint8)
TO_TRAIN_ID = [IGNORE] * 256  # of a labelId
for train_id, label_id in enumerate(LABEL_IDS):
    TO_TRAIN_ID[label_id] = train_id
TO_LABEL_ID = LABEL_IDS + [0] * (256 - len(CLASSES))  # of a trainId
# Where each data set keeps a split: images, how their names end, labels, how theirs go on (labelIds.png).
LAYOUTS = {
    "cityscapes": ("leftImg8bit/{}", "_leftImg8bit.png", "gtFine/{}", "_gtFine_"),
    "darkzurich": ("rgb_anon/{}/night", "_rgb_anon.png", "gt/{}/night", "_gt_"),
    "acdc": ("rgb_anon/night/{}", "_rgb_anon.png", "gt/night/{}", "_gt_"),
    "nighttime-driving": ("leftImg8bit/{}/night", "_leftImg8bit.png",
                          "gtCoarse_daytime_trainvaltest/{}/night", "_gtCoarse_"),
}  # fmt: skip
# Target days and nights for training, and how the days' names end.
TARGETS = {
    "darkzurich": ("rgb_anon/train/day", "rgb_anon/train/night", "_rgb_anon.png"),
    "acdc": ("rgb_anon/night/train_ref", "rgb_anon/night/train", "_rgb_ref_anon.png"),
}
PICTURES = (".jpeg", ".jpg", ".png", ".webp")
# What else looks like a picture is not read: it is refused, not passed over.
OTHER_PICTURES = (".avif", ".bmp", ".gif", ".heic", ".heif", ".jfif", ".jp2", ".jpe", ".jxl", ".pgm", ".ppm",
                  ".tga", ".tif", ".tiff")  # fmt: skip
Sample = collections.namedtuple("Sample", "image label", defaults=(None,))


class DataError(ValueError):
    """A file is missing, unreadable or not what its name promises."""


def samples(layout, root, split="val", must_exist=True):
    """[Sample] of paths of a split; label is None where the data set has no labels for it."""
    folder, ending, label_folder, middle = LAYOUTS[layout]
    images = find(root, folder.format(split), ending, must_exist)
    labels = find_labels(root, label_folder.format(split), middle)
    if labels and images.keys() != labels.keys():
        alone = sorted(images.keys() ^ labels.keys())
        what = "label of this image" if alone[0] in images else "image of this label"
        raise DataError(f"{(images | labels)[alone[0]]}: there is no {what} ({len(alone)} are alone)")
    return [Sample(image, labels.get(name)) for name, image in images.items()]


def find_labels(root, name, middle):
    """As `find` does, labelIds or else labelTrainIds; none if there is no such folder, or no picture in it."""
    for kind in ("labelIds", "labelTrainIds"):
        labels = find(root, name, f"{middle}{kind}.png", must_exist=False, alone=False)
        if labels:
            return labels
    folder = folder_of(root, name)
    for path in walk(folder) if folder else ():
        if is_picture(path):
            wanted = f"names that end with {middle}labelIds.png or {middle}labelTrainIds.png"
            raise DataError(f"{folder}: no label in it: expected {wanted}, found {path.name}")
    return {}


def targets(layout, root, pairs="corresp"):
    """(day images, night images) of "darkzurich" or "acdc" train. No label is read.

    pairs: "corresp": element i of both shows one place, by Dark Zurich's corresp/train/night/**/*_ref_day.csv
    or ACDC's names; the path of a csv of that form (Dark Zurich only); "none": all of both, unrelated."""
    day_folder, night_folder, ending = TARGETS[layout]
    days, nights = find(root, day_folder, ending), find(root, night_folder, "_rgb_anon.png")
    if pairs == "none":
        return list(days.values()), list(nights.values())
    if layout == "acdc" and pairs == "corresp":
        return partners(nights, days, ending), list(nights.values())
    tables = [Path(pairs)]
    if pairs == "corresp":
        tables = find(root, "corresp/train/night", "_ref_day.csv", must_exist=False, alone=False).values()
    if not tables or not all(table.is_file() for table in tables):
        where = f"{root}/corresp/train/night" if pairs == "corresp" else pairs
        ways = "--pairs FILE names a csv of NIGHT,DAY lines, --pairs none takes unrelated images"
        raise DataError(f"{where}: no list of pairs there: {ways}")
    pairs = []
    for table in tables:
        pairs += read_pairs(table, days, nights)
    days, nights = zip(*pairs, strict=True)
    return list(days), list(nights)


def read_pairs(table, days, nights):
    """[(day, night)] paths of a csv of lines train/night/STEM,train/day/STEM."""
    pairs = []
    for number, line in enumerate(Path(table).read_text("utf-8-sig", "replace").splitlines(), 1):
        if not line.strip():
            continue
        night, _, day = [stem.strip() for stem in line.partition(",")]
        pair = days.get(day.removeprefix("train/day/")), nights.get(night.removeprefix("train/night/"))
        if None in pair:
            wanted = "train/night/STEM,train/day/STEM of two files"
            raise DataError(f"{table}: line {number} is not {wanted}: {line[:99]!r}")
        pairs.append(pair)
    if not pairs:
        raise DataError(f"{table}: no pair in it")
    return pairs


def synthetic_nights(root, cityscapes):
    """Paths of ready-made S_n, one for each image of the folder `cityscapes`: leftImg8bit's tree and names,
    under `root`."""
    ending = "_leftImg8bit.png"
    folder = "leftImg8bit/train"
    return partners(find(cityscapes, folder, ending), find(root, folder, ending), ending)


def partners(names, files, ending):
    alone = [name for name in names if name not in files]
    if alone:
        beside = next(iter(files.values()))
        raise DataError(f"{alone[0]}{ending}: no such file beside {beside} ({len(alone)} are missing)")
    return [files[name] for name in names]


def pictures(paths):
    """[Sample] of picture files, and of the pictures in folders and the folders in these."""
    found = []
    for path in map(Path, paths):
        inside = [path]
        if path.is_dir():
            inside = sorted(each for each in walk(path) if is_picture(each))
        if not path.exists() or not inside:
            raise DataError(f"{path}: no picture there ({', '.join(PICTURES)})")
        for each in inside:
            if each.suffix.lower() in OTHER_PICTURES:
                raise DataError(f"{each}: not read: save it as one of {', '.join(PICTURES)}")
            found.append(Sample(each))
    return found


def find(root, name, ending, must_exist=True, alone=True):
    """{path below ROOT/name without its ending: path}, sorted. The folder may also be the one ROOT/*/name
    (zips unpacked side by side). Two files of one name, and pictures of a wrong one, are refused: part of the
    data would be missing. alone False: other pictures may lie there, but not the same in another format."""
    folder = folder_of(root, name)
    if folder is None and must_exist:
        above = next(path for path in Path(root, name).absolute().parents if path.is_dir())
        holds = sorted(os.listdir(above))[:9]
        raise DataError(f"{Path(root, name)}: no such folder ({above} holds {holds})")
    found = {}
    for path in walk(folder) if folder else ():
        if path.name.lower().endswith(ending.lower()):
            key = path.relative_to(folder).as_posix()[: -len(ending)]
            if key in found:
                raise DataError(f"{path}: has the name of {found[key].name} but for capitals: remove one")
            found[key] = path
        elif is_picture(path) and (alone or path.stem.endswith(Path(ending).stem)):
            raise DataError(f"{path}: expected a name that ends with {ending}")
    if not found and must_exist:
        raise DataError(f"{folder}: no file *{ending} in it")
    return dict(sorted(found.items()))


def folder_of(root, name):
    """ROOT/name or the one ROOT/*/name; None if there is neither."""
    root = Path(root)
    folders = [root / name] if (root / name).is_dir() else sorted(root.glob(f"[!._]*/{name}"))
    if len(folders) > 1:
        raise DataError(f"{root}: {name} is there more than once: {folders[0]}, {folders[1]}")
    return folders[0] if folders else None


def walk(folder):
    """Yield every file below a folder. Links are followed, but not upwards. What cannot be listed and links to
    nothing are refused."""

    def refuse(error):
        raise DataError(f"{error.filename}: cannot be listed ({error.strerror})")

    for here, inside, names in os.walk(folder, onerror=refuse, followlinks=True):
        above = {os.path.realpath(path) for path in (here, *Path(here).parents)}
        inside[:] = [d for d in inside if d[0] != "." and os.path.realpath(Path(here, d)) not in above]
        for name in names:
            path = Path(here, name)
            if name[0] == ".":
                continue
            if not path.exists():
                raise DataError(f"{path}: a link to nothing")
            yield path


def is_picture(path):
    return path.suffix.lower() in PICTURES + OTHER_PICTURES


def label_warning(samples, needed=False):
    """What is odd about some thirty labels of a split, as one line; None if nothing is. needed: to find no
    class in them is a DataError."""
    seen = random.Random(0).sample(samples, min(30, len(samples)))
    classes = set()
    for sample in seen:
        classes |= {value for _, value in open_label(sample.label).getcolors(256)} - {IGNORE}
    what = f"{samples[0].label.parent.parent}: of {len(seen)} labels looked at,"
    if not classes and needed:
        raise DataError(f"{what} every pixel is void (ignored): nothing to learn from")
    if not classes:
        return f"warning: {what} every pixel is void (ignored)"
    if len(classes) == 1:
        return f"warning: {what} all pixels that are not void are {NAMES[min(classes)]}"
    if "TrainIds" not in samples[0].label.name and LABEL_IDS[max(classes)] <= 18:
        say = "if they are trainIds, name them _labelTrainIds.png"
        return f"warning: {what} named labelIds, none is above 18: {say}"
    return None


class FourDomains:
    """Item k is a dict of uint8 tensors, all `crop` = (H, W): source_day, source_label, target_day,
    target_night and, of the paths `synthetic`, source_night. What is random about it comes from (seed, k),
    k counting samples from the first step on, so that threads and resumed runs see the same items.

    source: [Sample]; days, nights: paths, element i of both showing one place if `paired`; without days there
    is no target. scale: range of the resizing before the crop. Before item `targets_from` no target_day is
    decoded, and a target_night only if S_n is made from it."""

    def __init__(self, source, days, nights, crop, *, paired=True, synthetic=None, scale=(0.5, 1.0), seed=0,
                 length=1, targets_from=0):  # fmt: skip
        self.source, self.days, self.nights, self.synthetic = source, days, nights, synthetic
        self.crop, self.paired, self.scale, self.seed = crop, paired, scale, seed
        self.length, self.targets_from = length, targets_from
        self.orders = {}

    def __len__(self):
        return self.length

    def __getitem__(self, k):
        rng = random.Random(f"{self.seed} {k} 0")
        joined = k >= self.targets_from
        n = self.pick("source", self.source, k)
        image_path, label_path = self.source[n]
        image = open_image(image_path)
        label = open_alike(open_label, label_path, image, image_path)
        cut_source = random_crop(image.size, self.crop, self.scale, rng)
        item = {"source_day": cut_source(image), "source_label": cut_source(label, Image.NEAREST)[0]}
        if self.synthetic:
            made = open_alike(open_image, self.synthetic[n], image, image_path)
            item["source_night"] = cut_source(made)
        if not self.days or (self.synthetic and not joined):
            return item

        n = self.pick("night", self.nights, k)
        night = open_image(self.nights[n])
        cut_night = random_crop(night.size, self.crop, self.scale, rng)
        item["target_night"] = cut_night(night)
        if joined and self.paired:  # one place: cut alike
            item["target_day"] = cut_night(open_alike(open_image, self.days[n], night, self.nights[n]))
        elif joined:
            day = open_image(self.days[self.pick("day", self.days, k)])
            item["target_day"] = random_crop(day.size, self.crop, self.scale, rng)(day)
        return item

    def pick(self, domain, files, k):
        """The number of item k's file, in an order that is new for every pass over the files."""
        key = f"{self.seed} {domain} {k // len(files)}"
        if key not in self.orders:
            self.orders[key] = random.Random(key).sample(range(len(files)), len(files))
        return self.orders[key][k % len(files)]


def random_crop(size, crop, scale, rng):
    """Draw one random scale, crop and flip for Pillow images of `size` (width, height). Returns the function
    that applies them and gives a (C, H, W) uint8 tensor, so that whatever belongs together is cut alike."""
    width, height = size
    crop_height, crop_width = crop
    least = max(crop_height / height, crop_width / width)  # smaller, and the crop would not be filled
    factor = rng.uniform(max(scale[0], least), max(scale[1], least))
    box_height = min(max(1, round(crop_height / factor)), height)
    box_width = min(max(1, round(crop_width / factor)), width)
    top = rng.randint(0, height - box_height)
    left = rng.randint(0, width - box_width)
    flip = rng.random() < 0.5

    def cut(image, mode=Image.BILINEAR):
        box = (left, top, left + box_width, top + box_height)
        part = TF.pil_to_tensor(image.resize((crop_width, crop_height), mode, box))
        return part.flip(-1) if flip else part

    return cut


def prefetch(load, items, workers):
    """Yield load(item) of each item, in order, by threads that are `workers` items ahead: Pillow decodes side
    by side in threads, which need no shared memory and raise an item's own exception."""
    with concurrent.futures.ThreadPoolExecutor(max(1, workers)) as pool:
        waiting = collections.deque()
        for item in items:
            waiting.append(pool.submit(load, item))
            if len(waiting) > workers:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


def load(sample):
    """Sample -> dict of name (the file's stem), image (3, H, W) and, if it has one, label (H, W), uint8."""
    image = open_image(sample.image)
    item = {"name": Path(sample.image).stem, "image": TF.pil_to_tensor(image)}
    if sample.label:
        item["label"] = TF.pil_to_tensor(open_alike(open_label, sample.label, image, sample.image))[0]
    return item


def load_pair(paths):
    """Two images that belong together -> dict of the first one, as of `load`."""
    first, second = paths
    image = open_image(first)
    open_alike(open_image, second, image, first)
    return {"name": Path(first).stem, "image": TF.pil_to_tensor(image)}


def open_alike(decode, path, image, partner):
    """decode(path), which must have the size of `image`, the decoded file `partner`."""
    opened = decode(path)
    if opened.size != image.size:
        sizes = f"is {opened.width} x {opened.height}, but {partner} is {image.width} x {image.height}"
        raise DataError(f"{path}: {sizes}")
    return opened


def open_image(path):
    """Decoded RGB Pillow image. JPEG and WebP are turned as their EXIF says; PNGs, like labels, are not."""
    image = decoded(path)
    if image.mode not in ("RGB", "RGBA", "P", "L", "LA", "1"):
        raise DataError(f"{path}: expected an 8-bit RGB image, found mode {image.mode}")
    if image.format == "PNG" and bit_depth(path) == 16:
        raise DataError(f"{path}: expected an 8-bit RGB image, found 16 bits a channel: convert it to 8")
    if image.format != "PNG":
        with contextlib.suppress(Exception):  # broken EXIF says nothing about orientation
            image = ImageOps.exif_transpose(image)
    return image.convert("RGB")


def open_label(path):
    """Decoded label as a Pillow image of trainIds; its name says whether it stores labelIds or trainIds."""
    image = decoded(path)
    if image.mode == "P":  # what rewrites a file may renumber its palette
        save = "of i = Image.open(FILE) save i.convert('L') if it looks grey"
        save += ", else Image.frombytes('L', i.size, i.tobytes())"
        raise DataError(f"{path}: has a palette, and its numbers may not be classes: {save}")
    if image.format != "PNG" or image.mode != "L" or bit_depth(path) != 8:
        found = f"{image.format}, mode {image.mode}"
        if image.format == "PNG":
            found += f", {bit_depth(path)} bits"
        raise DataError(f"{path}: expected an 8-bit single-channel PNG, found {found}")
    train_ids = Path(path).stem.lower().endswith("labeltrainids")
    largest = len(CLASSES) - 1 if train_ids else max(LABEL_IDS)
    wrong = [value for _, value in image.getcolors(256) if largest < value < IGNORE]
    if wrong:
        raise DataError(f"{path}: holds the value {wrong[0]}, but labels are 0 to {largest} and {IGNORE}")
    return image if train_ids else image.point(TO_TRAIN_ID)


def bit_depth(path):
    """Of a PNG, as its header says: Pillow spreads 4-bit greys over 0 to 255, and halves 16 bits to 8."""
    with open(path, "rb") as file:
        return file.read(25)[24]


def decoded(path):
    """A Pillow image. What Pillow raises on damaged files, a dozen types, becomes a DataError."""
    try:
        image = Image.open(path, formats=("PNG", "JPEG", "WEBP"))
        image.load()
    except Exception as error:  # noqa: BLE001
        reason = getattr(error, "strerror", None) or " ".join(str(error).split()) or type(error).__name__
        raise DataError(f"{path}: not a readable image ({reason})") from None
    if image.format in ("PNG", "WEBP") and getattr(image, "n_frames", 1) > 1:
        raise DataError(f"{path}: expected one picture, found {image.n_frames} in one file")
    return image


def colourise(labels):
    """(..., H, W) trainIds -> (..., 3, H, W) uint8 in the Cityscapes colours, ignore in black."""
    return PALETTE[labels.long().cpu()].movedim(-1, -3)


DEMO_SIZE = (256, 128)
# trainId -> base colour: the two cities differ as data sets do. Cars and clothes have any colour in both.
DEMO_COLOURS = {
    "source": {0: (105, 103, 106), 1: (165, 152, 150), 2: (150, 140, 128), 5: (62, 64, 66),
               8: (72, 105, 55), 10: (190, 212, 232)},
    "target": {0: (86, 84, 80), 1: (138, 130, 115), 2: (150, 122, 108), 5: (70, 62, 52),
               8: (80, 110, 50), 10: (208, 214, 216)},
}  # fmt: skip


def make_demo_city(root, train=160, val=24):
    """Write the demo city: ROOT/cityscapes (labelled source days) and ROOT/darkzurich (unlabelled target days
    and nights, a true list of pairs, labelled val nights), in the real layouts. Always the same pixels."""

    def at(name):
        Path(root, name).parent.mkdir(parents=True, exist_ok=True)
        return Path(root, name)

    pairs = ""
    for number in range(train + val):
        split, n = ("train", number) if number < train else ("val", number - train)
        image, label = draw_street("source", f"{split} {n}", "day")
        name = f"{split}/demo/demo_{n:06d}_000000"
        image.save(at(f"cityscapes/leftImg8bit/{name}_leftImg8bit.png"))
        label.point(TO_LABEL_ID).save(at(f"cityscapes/gtFine/{name}_gtFine_labelIds.png"))
        day, night = (f"{split}/{x}/DEMO_{x}/DEMO_{x}_frame_{n:06d}" for x in ("day", "night"))
        draw_street("target", f"{split} {n}", "day")[0].save(at(f"darkzurich/rgb_anon/{day}_rgb_anon.png"))
        image, label = draw_street("target", f"{split} {n}", "night")
        image.save(at(f"darkzurich/rgb_anon/{night}_rgb_anon.png"))
        if split == "train":
            pairs += f"{night},{day}\n"
        else:
            label.save(at(f"darkzurich/gt/{night}_gt_labelTrainIds.png"))
    # The last thing to be written: the city is whole.
    at("darkzurich/corresp/train/night/DEMO_night/DEMO_night_ref_day.csv").write_text(pairs)


def draw_street(city, place, light):
    """(RGB photograph, trainId label) of a street of `city` ("source" or "target") by "day" or "night".
    `place` fixes what stands still, and with the light what moves."""
    width, height = DEMO_SIZE
    rng = random.Random(f"{city} {place}")
    image, label, lights = Image.new("RGB", DEMO_SIZE), Image.new("L", DEMO_SIZE, IGNORE), []

    def paint(train_id, shape, xy, colour=None):
        if colour is None:
            colour = tuple(int(c + rng.uniform(-14, 14)) for c in DEMO_COLOURS[city][train_id])
        getattr(ImageDraw.Draw(image), shape)(xy, fill=colour)
        getattr(ImageDraw.Draw(label), shape)(xy, fill=train_id)

    horizon = int(height * ({"source": 0.42, "target": 0.48}[city] + rng.uniform(-0.04, 0.04)))
    vanish, x, depth = width * rng.uniform(0.4, 0.6), -10, height - horizon
    left, right = (vanish + side * width * rng.uniform(0.45, 0.7) for side in (-1, 1))
    paint(10, "rectangle", (0, 0, width, horizon))
    paint(1, "rectangle", (0, horizon, width, height))
    paint(0, "polygon", [(vanish - 3, horizon), (vanish + 3, horizon), (right, height), (left, height)])
    while x < width:  # the skyline: trees, houses with windows, gaps
        w, kind = rng.randint(30, 54), rng.choice(("house", "house", "tree", "gap"))
        top = rng.randint(4, horizon // 2)
        if kind == "tree":
            paint(8, "rectangle", (x + w * 0.4, top, x + w * 0.6, horizon + 4))
            for _ in range(14):
                cx, cy, r = x + w * rng.uniform(0.2, 0.8), rng.uniform(top, horizon - 6), rng.uniform(8, 13)
                paint(8, "ellipse", (cx - r, cy - r, cx + r, cy + r))
        elif kind == "house":
            paint(2, "rectangle", (x, top, x + w, horizon + 4))
            for wx, wy in itertools.product(range(x + 4, x + w - 8, 11), range(top + 5, horizon - 10, 14)):
                paint(2, "rectangle", (wx, wy, wx + 6, wy + 8), (70, 80, 95))
                if rng.random() < 0.3:
                    lights.append((wx + 3, wy + 4, 5, (1.0, 0.8, 0.45)))
        x += w
    for side, t in itertools.product((-1, 1), (0.15, 0.5)):  # lamp posts along the kerb
        x, y, h, w = vanish + side * (12 + t * width * 0.6), horizon + t * depth, 30 + 80 * t, 2.5 + 5 * t
        paint(5, "rectangle", (x - w, y - h, x + w, y))
        lights.append((x, y - h, 18 + 45 * t, (1.0, 0.72, 0.38)))
    rng = random.Random(f"{city} {place} {light}")  # from here on, what moves, the farthest first
    for t in sorted(rng.uniform(0.15, 0.85) for _ in range(rng.randint(1, 4))):
        side = rng.choice((-1, 1))
        x = vanish + side * t * width * 0.28
        draw_car(paint, rng, x, horizon + t * depth, 8 + 26 * t, lights, oncoming=side < 0)
    for t in sorted(rng.uniform(0.15, 0.7) for _ in range(rng.randint(1, 4))):
        x = vanish + rng.choice((-1, 1)) * (16 + t * width * rng.uniform(0.55, 0.8))
        draw_person(paint, rng, x, horizon + t * depth, 22 + 50 * t)
    return photograph(image, lights, city, place, light), label


def draw_car(paint, rng, x, y, s, lights, oncoming):
    """A car of 2s pixels' width that stands on (x, y): of any colour, with wheels, a window and two lights."""
    body = tuple(rng.randint(20, 235) for _ in range(3))
    lamp = (255, 250, 225) if oncoming else (190, 25, 20)
    for side in (-1, 1):
        wheel = x + side * s * 0.7
        paint(13, "rectangle", (wheel - s * 0.2, y - s * 0.4, wheel + s * 0.2, y), (15, 15, 15))
    paint(13, "rectangle", (x - s, y - s * 0.9, x + s, y - s * 0.2), body)
    for size, colour in ((1, body), (0.75, (40, 50, 60))):  # the cabin, and the window in it
        foot, roof, top = s * 0.85 * size, s * 0.65 * size, y - s * (0.9 + 0.6 * size)
        corners = [(x - foot, y - s * 0.9), (x + foot, y - s * 0.9), (x + roof, top), (x - roof, top)]
        paint(13, "polygon", corners, colour)
    for side in (-1, 1):
        cx, cy, r = x + side * s * 0.72, y - s * 0.6, s * 0.17
        paint(13, "ellipse", (cx - r, cy - r, cx + r, cy + r), lamp)
        lights.append((cx, cy, s * 0.7, tuple(c / 255 for c in lamp)))


def draw_person(paint, rng, x, y, h):
    """A person h pixels tall who stands on (x, y), in trousers and a shirt of any colour."""
    shirt = tuple(rng.randint(40, 235) for _ in range(3))
    trousers = tuple(rng.randint(20, 90) for _ in range(3))
    paint(11, "rectangle", (x - h * 0.12, y - h * 0.45, x + h * 0.12, y), trousers)
    paint(11, "rectangle", (x - h * 0.18, y - h * 0.82, x + h * 0.18, y - h * 0.4), shirt)
    paint(11, "ellipse", (x - h * 0.1, y - h, x + h * 0.1, y - h * 0.78), (205, 160, 130))


def photograph(image, lights, city, place, light):
    """The drawn street by day in the sun, by night in the dark with its lights [(x, y, radius, colour)]."""
    rng, night = random.Random(f"camera {city} {place} {light}"), light == "night"
    noise = torch.randn(3, *DEMO_SIZE[::-1], generator=torch.Generator().manual_seed(rng.getrandbits(32)))
    blur = ImageFilter.GaussianBlur((0.5 if city == "source" else 0.8) + 0.3 * night)
    scene = TF.pil_to_tensor(image.filter(blur)).float() / 255
    y, x = torch.meshgrid(*(torch.arange(side) for side in DEMO_SIZE[::-1]), indexing="ij")
    if night:
        light = torch.full_like(scene, 0.14 * rng.uniform(0.7, 1.1))
        glare = torch.full_like(scene, 0.03 * rng.uniform(0.5, 1))
        for lx, ly, radius, colour in lights:
            square = ((x - lx) ** 2 + (y - ly) ** 2) / radius**2
            colour = torch.tensor(colour).view(3, 1, 1)
            light += 0.6 * colour * torch.exp(-square)  # falls on what is near, and into the lens
            glare += colour * (torch.exp(-square * 60) + 0.03 * torch.exp(-square * 4))
        scene = scene * light + glare
    else:
        haze = rng.uniform(0, 0.15)
        scene = scene * rng.uniform(0.75, 1.1) * (1 - haze) + haze * 0.8
    if city == "target":  # a warmer, flatter camera
        scene = (scene * torch.tensor([1.06, 1.0, 0.88]).view(3, 1, 1)) ** 0.9
    return TF.to_pil_image(((scene + 0.01 * noise).clamp(0, 1) * 255).to(torch.uint8))
