"""Train a night segmenter from labelled days and unlabelled nights.

    python train.py --demo                                           no data needed, minutes on a laptop
    python train.py --cityscapes DIR --darkzurich DIR                the method
    python train.py --cityscapes DIR --darkzurich DIR --day-only     the baseline: labelled days alone
    python train.py ... --resume                                     the same command again goes on
    torchrun --nproc_per_node=N train.py ...                         on N devices

Writes OUT/night.pt at the end (M_n alone, for evaluate.py and --weights), and on the way OUT/last.pt (all
that --resume needs), OUT/log.csv, OUT/args.json and OUT/samples.png (night image | prediction | label).
"""

import argparse
import contextlib
import csv
import io
import json
import math
import os
import random
import signal
import sys
import time
from pathlib import Path

import torch
from torch import distributed, nn

import ccdistill
import datasets
import evaluate
import models
from evaluate import say
from losses import segmentation_loss

try:
    import fcntl
    import resource
except ImportError:  # on Windows
    fcntl = resource = None

# The environment of torchrun is believed whole or not at all: other launchers set some of it.
LAUNCHED = {"RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"} <= os.environ.keys()
RANK = int(os.environ["RANK"]) if LAUNCHED else 0
PROCESSES = int(os.environ["WORLD_SIZE"]) if LAUNCHED else 1
STOP = []  # why this step is the last: a signal's number, or the error of a file that cannot be read


def train(args):
    """One run, to OUT/night.pt after step --steps. Returns what `validate` does, by the first process."""
    stream, nights, validation = load_data(args)
    if args.check:
        return check_files(stream, validation, args)
    warn(stream.source, validation, args)
    method, optimizer = build(args)
    if not Path(args.out, "last.pt").exists():
        rehearse(method, stream, args)
    with claim(args):  # last, so that what is wrong until here leaves no OUT
        start, rows = resume(method, optimizer, args)
        loop(method, optimizer, stream, validation, start, rows, args)
        if len(rows) < args.steps:
            return end_early()
        return finish(method, optimizer, nights, validation, rows, args)


def loop(method, optimizer, stream, validation, start, rows, args):
    """Steps start + 1 to --steps, or until there is a reason to STOP. Each adds a row to `rows`."""
    parallel = method.train()
    if PROCESSES > 1:  # DDP raises on parameters without gradient: the head has none until the targets join
        parallel = nn.parallel.DistributedDataParallel(method, find_unused_parameters=args.adapt_from > 0)
    last_report = start, time.monotonic()
    for step, batch in enumerate(batches(stream, start, args), start + 1):
        seed_and_rate(optimizer, step, args)
        optimizer.zero_grad()
        if args.compile:
            torch.compiler.cudagraph_mark_step_begin()
        with autocast(args):
            terms = parallel(batch, adapt=step > args.adapt_from * args.steps)
        terms["total"].backward()
        optimizer.step()

        means, stop = mean_over_processes(terms, method, bool(STOP))
        if not all(math.isfinite(value) for value in means.values()):
            say_what_works = "begin again with a lower --lr and a new --out"
            raise FloatingPointError(f"step {step} is not finite ({means}): {say_what_works}")
        rows.append({"step": step, "lr": optimizer.param_groups[0]["lr"], **means})
        due = step % args.eval_every == 0 and step < args.steps
        if step % args.log_every == 0 or step == args.steps:
            last_report = report(rows[-1], last_report, args)
        outcome = None
        try:
            if due:
                outcome = validate(method.night, validation, args)
        finally:  # an error in there loses no step
            if due or stop or step == args.steps:
                save(method, optimizer, rows, args, outcome)
        if stop:
            break


def seed_and_rate(optimizer, step, args):
    """What a step draws (dropout, styles, pasting) comes from its number; the rest of its randomness is its
    samples', see datasets.FourDomains. The rate decays polynomially, to the power of 0.9."""
    torch.manual_seed(random.Random(f"{args.seed} {step} {RANK}").getrandbits(63))
    for group in optimizer.param_groups:
        group["lr"] = args.lr * (1 - (step - 1) / args.steps) ** 0.9


def mean_over_processes(terms, method, stop):
    """({name: mean over processes} of the terms and of the gradient's norm; does any process want to stop),
    by one message a step between processes and one wait for the device."""
    norm = nn.utils.get_total_norm([p.grad for p in method.parameters() if p.grad is not None])
    values = [*terms.values(), norm, torch.full_like(norm, stop)]
    values = torch.stack([value.detach().float() for value in values])
    if PROCESSES > 1:
        distributed.all_reduce(values)
    *means, stops = (values / PROCESSES).tolist()
    return dict(zip([*terms, "gradient"], means, strict=True)), stops > 0


def report(row, last_report, args):
    """Print the progress line, with the speed since the last one. Returns this one's step and time."""
    step, now = row["step"], time.monotonic()
    rate = (step - last_report[0]) / (now - last_report[1])
    domains = 4 if step > args.adapt_from * args.steps else 2
    if args.day_only:
        domains = 1
    images = rate * domains * args.batch_size * PROCESSES
    parts = [f"step {step}/{args.steps}", f"{rate:.2f} steps/s", f"{images:.1f} images/s"]
    left = (args.steps - step) / rate
    if left:
        parts.insert(1, f"{left / 60:.0f} min left" if left > 90 else f"{left:.0f} s left")
    memory = peak_memory(args)
    if memory:
        parts.append(f"{memory:.0f} MB")
    parts += [f"{name} {value:.4g}" for name, value in row.items() if name != "step"]
    say("  ".join(parts))
    return step, now


def peak_memory(args):
    """MB at the peak so far: of the GPU, else of this process (0 where the system does not tell)."""
    if args.device.startswith("cuda"):
        return torch.cuda.max_memory_allocated() / 2**20
    if resource is None:
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**20 if sys.platform == "darwin" else 2**10)


def rehearse(method, stream, args):
    """One step with the targets before the first, so that what does not fit them is told now, and not at a
    quarter of the run. Nothing is kept: in eval mode no statistics and no teacher move, and a step seeds
    itself."""
    first = min(math.floor(args.adapt_from * args.steps), args.steps - 1)
    batch = to_device(load_step(stream, first * PROCESSES + RANK, args), args)
    method.eval()
    with torch.compiler.set_stance("force_eager"), autocast(args):
        terms = method(batch, adapt=first + 1 > args.adapt_from * args.steps)
    terms["total"].backward()
    method.zero_grad()
    moments = sum(2 * p.numel() * p.element_size() for p in method.parameters() if p.requires_grad)  # AdamW's
    memory = peak_memory(args)
    if memory:
        say(f"one step rehearsed: the run needs about {memory + moments / 2**20:.0f} MB")


@torch.compiler.set_stance("force_eager")  # frames come in many sizes
def validate(network, validation, args):
    """Score M_n at night, by one process. Returns the scores and [image, prediction, label] of four images."""
    if RANK or not validation:
        return None
    result = evaluate.evaluate(network, validation, args.device, args.workers)
    with evaluate.evaluating(network):
        views = evaluate.predictions(network, validation[:4], args.device, args.workers)
        tiles = [[item["image"], prediction, item["label"]] for item, prediction, _ in views]
    say("at night:  " + "  ".join(f"{name} {result[name]:.1f}" for name in evaluate.MEANS))
    return result, tiles


def finish(method, optimizer, nights, validation, rows, args):
    """After the last step: M_n's statistics, its score, which is returned, and OUT/night.pt."""
    if RANK:
        return None
    if takes_statistics(args):
        some = [datasets.Sample(night) for night in nights[:: math.ceil(len(nights) / 200)]]
        items = datasets.prefetch(datasets.load, some, args.workers)
        images = (item["image"][None].to(args.device) / 255 for item in items)
        ccdistill.take_statistics(method.night, images)
    outcome = validate(method.night, validation, args)
    save(method, optimizer, rows, args, outcome)
    state = {"model": method.night.state_dict(), "args": vars(args), "step": args.steps}
    save_whole(state, Path(args.out, "night.pt"))
    say(f"{args.out}/night.pt: M_n after {args.steps} steps")
    return outcome


def end_early():
    """Raise what stopped this process; another's reason is told by that one."""
    for reason in STOP:
        if isinstance(reason, Exception):
            raise reason
    if STOP:
        say("stopped; the same command with --resume goes on")
        sys.exit(128 + STOP[0])


class DayOnly(nn.Module):
    """The baseline: labelled source days alone, in CCDistill's place."""

    def __init__(self, model):
        super().__init__()
        self.day = self.night = model

    def forward(self, batch, adapt=False):
        loss = segmentation_loss(self.day(batch["source_day"])[1], batch["source_label"])
        return {"seg_day": loss, "total": loss}


def build(args):
    """(method, optimizer) on their device."""
    torch.manual_seed(args.seed)
    resumed = Path(args.out, "last.pt").exists()  # whose weights come from there
    weights = "none" if resumed else args.weights
    model = models.DeepLab(args.backbone, len(datasets.NAMES), args.output_stride, weights)
    if args.day_only:
        method = DayOnly(model)
    else:
        method = ccdistill.CCDistill(
            model, weights={term: getattr(args, f"{term}_weight") for term in ccdistill.WEIGHTS},
            js_weight=args.js_weight, pseudo_threshold=args.pseudo_threshold,
            night_weights=args.night_weights, night_style=args.night_style,
            joint=args.batch_norm == "joint", projection=not args.no_projection,
            target_paired=args.pairs != "none", teacher=not args.no_teacher,
        )  # fmt: skip
    method = method.to(args.device, memory_format=torch.channels_last)
    if args.compile:  # on a GPU as CUDA graphs; on a CPU with eager's random numbers
        how = {"mode": "reduce-overhead"} if "cuda" in args.device else {"options": {"fallback_random": True}}
        for network in method.modules():  # and the teachers'; a graph has batches of one size
            if isinstance(network, models.DeepLab):
                network.compile(dynamic=False, **how)
    parameters = [p for p in method.parameters() if p.requires_grad]
    return method, torch.optim.AdamW(parameters, args.lr, weight_decay=5e-4, fused=True)


def autocast(args):
    device = torch.device(args.device).type
    return torch.autocast(device, torch.bfloat16, enabled=precision(args) == "bf16")


def load_data(args):
    """(training stream, paths of target nights, labelled validation nights)."""
    layout, root = target(args), args.acdc or args.darkzurich
    source = datasets.samples("cityscapes", args.cityscapes, "train")
    if not source[0].label:
        raise datasets.DataError(f"{args.cityscapes}: no gtFine/train with *_gtFine_labelIds.png in it")
    synthetic = []
    if args.synthetic_night:
        synthetic = datasets.synthetic_nights(args.synthetic_night, args.cityscapes)
    days, nights, validation = [], [], []
    if not args.day_only:
        days, nights = datasets.targets(layout, root, args.pairs)
    elif takes_statistics(args):
        _, nights = datasets.targets(layout, root, "none")
    if root and not Path(root).is_dir():  # with --day-only nothing has looked for it
        raise datasets.DataError(f"{root}: no such folder")
    if root:
        found = datasets.samples(layout, root, "val", must_exist=False)
        validation = [sample for sample in found if sample.label]
    parts = [f"{len(source)} labelled days"]
    if days:
        parts.append(f"{len(days)} target days and {len(nights)} nights (pairs: {args.pairs})")
    elif nights:
        parts.append(f"{len(nights)} nights for statistics")
    say(", ".join([*parts, f"{len(validation)} labelled nights to validate"]))
    size = args.batch_size * PROCESSES
    stream = datasets.FourDomains(
        source, days, nights, args.crop, paired=args.pairs != "none", synthetic=synthetic, scale=args.scale,
        seed=args.seed, length=args.steps * size, targets_from=math.floor(args.adapt_from * args.steps) * size,
    )  # fmt: skip
    return stream, nights, validation


def warn(source, validation, args):
    """Say what is odd about the labels and the batches. DataError for source labels without a class."""
    warnings = [datasets.label_warning(source, needed=True)]
    if validation:
        warnings.append(datasets.label_warning(validation))
    if args.batch_size == 1 and args.pairs == "none" and not args.day_only:
        what = "of one image a domain, unpaired, CDC's graphs and CDS have nothing to compare"
        warnings.append(f"warning: {what}: --batch-size 2 or more")
    for warning in filter(None, warnings):
        say(warning)


def check_files(stream, validation, args):
    """--check: read every image and pair, as training does. Says what the labels hold; DataError, after a line
    for each thing that is wrong."""
    jobs = [(datasets.load, sample) for sample in stream.source + validation]
    pairs = []
    if stream.synthetic:
        pairs += [(sample.image, made) for sample, made in zip(stream.source, stream.synthetic, strict=True)]
    if stream.paired and stream.days:
        pairs += zip(stream.nights, stream.days, strict=True)
    else:
        jobs += [(datasets.load, datasets.Sample(image)) for image in stream.days + stream.nights]
    jobs += [(datasets.load_pair, pair) for pair in pairs]

    def attempt(job):
        read, files = job
        try:
            return read(files)
        except (datasets.DataError, OSError) as error:
            return error

    wrong, sizes, pixels = set(), set(), torch.zeros(256, dtype=torch.int64)
    for number, outcome in enumerate(datasets.prefetch(attempt, jobs, args.workers)):
        if isinstance(outcome, Exception):
            wrong.add(str(outcome))
            continue
        sizes.add(tuple(outcome["image"].shape[:0:-1]))
        if number < len(stream.source):
            pixels += torch.bincount(outcome["label"].flatten(), minlength=256)
    for line in sorted(wrong):
        say(f"wrong: {line}")
    if wrong:
        raise datasets.DataError(f"{len(wrong)} things are wrong in {len(jobs)} images and pairs")
    names = dict(enumerate(datasets.NAMES)) | {datasets.IGNORE: "ignored"}
    shares = [f"{names[k]} {100 * pixels[k] / pixels.sum():.1f}" for k in pixels.nonzero().flatten().tolist()]
    say(f"labelled days, percent of pixels: {', '.join(shares)}")
    (width, height), (most, tallest) = min(sizes), max(sizes)
    say(f"images are {width} x {height} to {most} x {tallest}")
    warn(stream.source, validation, args)
    say(f"all {len(jobs)} images and pairs can be read")


def batches(stream, start, args):
    """Yield the process's share of each step's samples, from step `start` on, see `to_device`. One step ahead
    of what it yields: what cannot be read is a reason to STOP after the step before it."""
    shares = range(start * PROCESSES + RANK, len(stream) // args.batch_size, PROCESSES)
    waiting = None
    try:
        for batch in datasets.prefetch(lambda share: load_step(stream, share, args), shares, args.workers):
            if waiting:
                yield waiting
            waiting = to_device(batch, args)
    except (datasets.DataError, OSError) as error:
        STOP.append(error)
    if waiting:
        yield waiting


def load_step(stream, share, args):
    """One process's samples of one step, as a batch; in pinned memory, from which a GPU copies by itself."""
    first = share * args.batch_size
    batch = torch.utils.data.default_collate([stream[k] for k in range(first, first + args.batch_size)])
    if args.device.startswith("cuda"):
        batch = {name: x.pin_memory() for name, x in batch.items()}
    return batch


def to_device(batch, args):
    """On the device: images float in [0, 1], labels int64."""
    batch = {name: x.to(args.device, non_blocking=True) for name, x in batch.items()}
    label = batch.pop("source_label").long()
    return {name: x / 255 for name, x in batch.items()} | {"source_label": label}


def save(method, optimizer, rows, args, outcome=None):
    """By the first process: OUT/last.pt, OUT/log.csv and, of the outcome of `validate`, the scores in the last
    row and OUT/samples.png."""
    if RANK:
        return
    if outcome:
        rows[-1] |= {name: outcome[0][name] for name in evaluate.MEANS}
    state = {"model": method.state_dict(), "optimizer": optimizer.state_dict(), "args": vars(args)}
    save_whole(state | {"rows": rows, "step": rows[-1]["step"]}, Path(args.out, "last.pt"))
    try:
        with open(Path(args.out, "log.csv"), "w", newline="") as file:
            columns = {name: None for row in rows for name in row}
            writer = csv.DictWriter(file, columns)
            writer.writeheader()
            writer.writerows(rows)
        if outcome:
            picture = evaluate.sheet(outcome[1], ["night image", "prediction", "label"])
            picture.save(Path(args.out, "samples.png"))
    except OSError as error:  # another program may hold them open
        say(f"warning: {error}; the run goes on")


def save_whole(state, path):
    buffer = io.BytesIO()  # on a full disk torch itself names no reason
    torch.save(state, buffer)
    evaluate.write_whole(path, buffer.getbuffer())


# What a resumed run may change: the machine, messages, and to where its folders and files have moved.
MAY_CHANGE = {"out", "resume", "check", "device", "workers", "compile", "log_every", "eval_every", "weights",
              "cityscapes", "darkzurich", "acdc", "synthetic_night", "pairs"}  # fmt: skip


def identity(args):
    """What a resumed run has in common with the one that began."""
    same = {name: value for name, value in vars(args).items() if name not in MAY_CHANGE}
    return same | {
        "amp": precision(args),
        "night_statistics": "target" if takes_statistics(args) else "source",
        "target": target(args),
        "paired": args.pairs if args.pairs in ("corresp", "none") else "csv",
        "ready_made": bool(args.synthetic_night),
        "processes": PROCESSES,
    }


def precision(args):
    return args.amp or ("bf16" if args.device.startswith("cuda") else "off")


def takes_statistics(args):
    """Does M_n end with batch norm statistics of target nights?"""
    of_source = args.day_only or args.no_teacher or args.night_weights == "shared"
    return args.night_statistics == "target" or (args.night_statistics is None and not of_source)


def target(args):
    return "acdc" if args.acdc else "darkzurich"


@contextlib.contextmanager
def claim(args):
    """Inside, OUT is this run's: one process at a time can hold OUT/args.json. With --resume it may be there,
    of a run with the same `identity`."""
    if RANK:
        yield
        return
    path = Path(args.out, "args.json")
    names = ("args.json", "last.pt", "night.pt", "log.csv")
    existing = [name for name in names if Path(args.out, name).exists()]
    if existing and not (args.resume and path.exists()):
        way_out = "choose another --out" if args.resume else "add --resume, or choose another --out"
        raise datasets.DataError(f"{args.out}: holds {existing[0]}: {way_out}")
    if "night.pt" in existing and "last.pt" not in existing:
        what = "holds night.pt of a run that ended, and no last.pt to go on from"
        raise datasets.DataError(f"{args.out}: {what}: choose another --out")
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "r+" if existing else "x") as file:
        lock(file)
        if existing and path.stat().st_size:
            compare(path, args)
        elif existing[1:]:
            raise datasets.DataError(f"{path}: is empty beside {existing[1]}: choose another --out")
        else:  # new, or empty and alone: of a start that was killed before it wrote
            json.dump(vars(args) | identity(args), file, indent=1)
            file.flush()
        yield


def lock(file):
    """Hold the file until it is closed or the process ends; DataError if another process holds it."""
    if fcntl is None:
        return
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        what = "another process trains there (on several devices: torchrun)"
        raise datasets.DataError(f"{file.name}: {what}") from None
    except OSError:
        pass  # a file system without locks


def compare(path, args):
    """DataError unless OUT/args.json is of a run with this one's identity."""
    try:
        then = json.loads(path.read_text("utf-8-sig"))
    except ValueError:
        then = None
    if not isinstance(then, dict):
        raise datasets.DataError(f"{path}: is not what train.py wrote there: choose another --out")
    now = identity(args)
    different = [
        f"{name} {then.get(name)} there, {now[name]} here" for name in now if then.get(name) != now[name]
    ]
    if different:
        raise datasets.DataError(f"{path}: is of another run: {', '.join(different)}")


def resume(method, optimizer, args):
    """With --resume, put OUT/last.pt into its places, if there is one. Returns (its step, the log's rows)."""
    path = Path(args.out, "last.pt")
    exists = torch.tensor([float(args.resume and path.exists())], device=args.device)
    if PROCESSES > 1:
        distributed.all_reduce(exists)
        if 0 < exists < PROCESSES:
            raise datasets.DataError(f"{path}: not all processes see it: --out must be a shared folder")
    if not exists:
        return 0, []
    state = models.read_file(path)
    if not isinstance(state, dict) or not {"model", "optimizer", "rows", "step"} <= state.keys():
        raise datasets.DataError(f"{path}: is not what train.py wrote there: choose another --out")
    models.fit(method, state["model"], path)
    optimizer.load_state_dict(state["optimizer"])
    say(f"resumed at step {state['step']} of {path}")
    return state["step"], state["rows"]


def positive(kind):
    """An argparse type: a number of this kind above 0."""

    def convert(text):
        number = kind(text)
        if not number > 0:
            raise argparse.ArgumentTypeError(f"{text} is not above 0")
        return number

    convert.__name__ = kind.__name__  # argparse names it: invalid int value
    return convert


def parse_args(argv=None):
    parser = argparse.ArgumentParser(
        usage="python train.py --cityscapes DIR --darkzurich DIR [options]", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False,
    )  # fmt: skip
    whole, number = positive(int), positive(float)
    data = parser.add_argument_group("data")
    add, add_target = data.add_argument, data.add_mutually_exclusive_group().add_argument
    add("--cityscapes", metavar="DIR", help="labelled days: holds leftImg8bit/ and gtFine/")
    add_target("--darkzurich", metavar="DIR", help="days and nights: holds rgb_anon/, corresp/, gt/val/")
    add_target("--acdc", metavar="DIR", help="ACDC night: holds rgb_anon/night/, gt/night/val/")
    add_target("--demo", action="store_true", help="draw a small city, compare three runs on it")
    add("--pairs", default="corresp", help="a csv of NIGHT,DAY lines; none: unrelated images")
    add("--synthetic-night", metavar="DIR", help="ready-made nights, in leftImg8bit's tree")
    add("--crop", type=whole, nargs=2, default=[512, 512], help="height and width (512 512)")
    add("--scale", type=number, nargs=2, default=[0.5, 1.0], help="random resizing before the crop (0.5 1)")
    add("--workers", type=int, default=min(8, os.cpu_count() or 1), help="decoding threads")
    add("--check", action="store_true", help="read every file, say what is wrong, and train nothing")
    add = parser.add_argument_group("network").add_argument
    add("--backbone", choices=[*models.BACKBONES], default="resnet18", help="of torchvision (resnet18)")
    add("--output-stride", type=int, choices=(8, 16), default=16, help="image size over feature size (16)")
    add("--weights", default="imagenet", help="imagenet (the default, downloaded once), none, or a file")
    add("--night-weights", choices=ccdistill.NIGHT_WEIGHTS, default="norm", help="norm: all but norms shared")
    add("--batch-norm", choices=("domain", "joint"), default="domain", help="of each domain, or S with T")
    add = parser.add_argument_group("method").add_argument
    add("--day-only", action="store_true", help="the baseline: labelled source days alone")
    add("--night-style", choices=ccdistill.NIGHT_STYLES, default="random", help="how S_n is made (random)")
    for term, weight in ccdistill.WEIGHTS.items():
        add(f"--{term}-weight", type=float, default=weight, help=f"of the term `{term}` ({weight:g})")
    add("--js-weight", type=float, default=0.01, help="of the divergences in `content` (0.01)")
    add("--pseudo-threshold", type=float, default=0.9, help="softmax of a confident prediction (0.9)")
    add("--adapt-from", type=float, default=0.25, help="share (0 to 1) of --steps before targets join")
    add("--no-teacher", action="store_true", help="no averaged teacher, pasting or strong colours")
    add("--no-projection", action="store_true", help="embeddings are average-pooled features")
    add("--night-statistics", choices=("target", "source"), help="of batch norms at M_n's end")
    add = parser.add_argument_group("run").add_argument
    add("--out", metavar="DIR", default="runs/ccdistill", help="where everything is written")
    add("--resume", action="store_true", help="go on from OUT/last.pt, or begin if there is none")
    add("--steps", type=whole, default=50000, help="(%(default)s)")
    add("--batch-size", type=whole, default=2, help="images per domain and process (%(default)s)")
    add("--lr", type=number, default=5e-4, help="learning rate of AdamW (%(default)s)")
    add("--amp", choices=("off", "bf16"), help="mixed precision (bf16 on a GPU, else off)")
    add("--compile", action="store_true", help="torch.compile the networks")
    add("--seed", type=int, default=0)
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--eval-every", type=whole, default=500, help="steps between validations and saves (%(default)s)")
    add("--log-every", type=whole, default=20, help="steps between progress lines (%(default)s)")
    if parser.parse_args(argv).demo:
        shown = {"out": "runs/demo", "steps": 500, "batch_size": 4, "crop": [96, 192], "weights": "none"}
        parser.set_defaults(eval_every=500, **shown)
    args = parser.parse_args(argv)
    if args.check and (args.demo or PROCESSES > 1):
        parser.error("--check reads files of your own, in one process")
    if args.demo and (args.cityscapes or args.day_only or PROCESSES > 1):
        parser.error("--demo draws its own data and trains three times on it, in one process")
    day_alone = args.day_only and args.night_statistics != "target"
    if not args.demo and not (args.cityscapes and (args.darkzurich or args.acdc or day_alone)):
        parser.error("give --cityscapes DIR and (but for plain --day-only) --darkzurich or --acdc; or --demo")
    if not 0 <= args.adapt_from <= 1:
        parser.error("--adapt-from is a share of the steps, 0 to 1")
    if args.night_statistics == "target" and args.night_weights == "shared":
        parser.error("--night-statistics target needs norms of M_n's own: no --night-weights shared")
    evaluate.check_device(parser, its_own(args.device))
    return args


# What each step of the idea buys: heading, folder, and what the run changes.
DEMO_RUNS = (
    ("day-only", "day-only", {"day_only": True, "night_statistics": "source"}),
    ("+ S_n", "s_n", {"adapt_from": 1.0}),
    ("CCDistill", "ccdistill", {}),
)


def demo(args):
    """Draw the demo city, train each of DEMO_RUNS on it for as many steps, compare them at night."""
    out, city = Path(args.out), Path(args.out, "city")
    if not any(city.glob("darkzurich/corresp/train/night/*/*.csv")):  # the last thing to be written
        say(f"drawing a city into {city}")
        datasets.make_demo_city(city)
    common = {"cityscapes": f"{city}/cityscapes", "darkzurich": f"{city}/darkzurich", "resume": True}
    validation = datasets.samples("darkzurich", common["darkzurich"])
    headings, results, tiles = [], [], []
    for heading, folder, changes in DEMO_RUNS:
        say(f"\n{heading}: {args.steps} steps")
        run = argparse.Namespace(**vars(args) | common | changes | {"out": str(out / folder)})
        night = out / folder / "night.pt"
        if night.exists():
            compare(night.with_name("args.json"), run)
            network, _ = evaluate.load_model(night, device=args.device)
            outcome = validate(network, validation, run)
        else:
            outcome = train(run)
        night.with_name("last.pt").unlink(missing_ok=True)  # 250 MB that nobody needs any more
        headings.append(heading)
        results.append(outcome[0])
        tiles.append(outcome[1])
    rows = []
    for night_by_runs in zip(*tiles, strict=True):
        image, _, label = night_by_runs[0]
        rows.append([image, *[prediction for _, prediction, _ in night_by_runs], label])
    columns = ["night image", *headings, "label"]
    evaluate.sheet(rows, columns).save(out / "comparison.png")
    say("\n" + "at night".ljust(14) + "".join(heading.rjust(11) for heading in headings))
    say(evaluate.table(*results))
    say(f"{out / 'comparison.png'}: {', '.join(columns)}")


# Batch systems send the last three.
SIGNALS = ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1", "SIGUSR2", "SIGXCPU")


def on_signal(number, _):
    if number == signal.SIGINT and any(isinstance(reason, int) for reason in STOP):
        raise KeyboardInterrupt
    STOP.append(number)
    say("finishing this step, then saving (Ctrl-C again: stop at once)")


def main(argv=None):
    args = parse_args(argv)
    torch.backends.cudnn.benchmark = True  # the crop is fixed
    device = its_own(args.device)
    if device.startswith("cuda:"):
        torch.cuda.set_device(device)  # "cuda" is this one from here on
    if PROCESSES > 1:
        distributed.init_process_group("nccl" if args.device.startswith("cuda") else "gloo")
        if RANK:
            sys.stdout = open(os.devnull, "w")  # noqa: SIM115
    handlers = {}
    for name in () if args.check else SIGNALS:
        number = getattr(signal, name, None)
        if number and signal.getsignal(number) is not signal.SIG_IGN:  # nohup's
            handlers[number] = signal.signal(number, on_signal)
    try:
        run = demo if args.demo else train
        run(args)
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    if PROCESSES > 1:
        distributed.destroy_process_group()


def its_own(device):
    """torchrun's processes on a machine have a GPU each."""
    return f"cuda:{os.environ['LOCAL_RANK']}" if LAUNCHED and device == "cuda" else device


if __name__ == "__main__":
    try:
        main()
    except (datasets.DataError, models.WeightsError, FloatingPointError, OSError) as error:
        print(f"train.py: error: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)
