"""Train a night segmenter from labelled days and unlabelled nights.

    python train.py --demo                                           no data needed, minutes on a laptop
    python train.py --cityscapes DIR --darkzurich DIR                the method
    python train.py --cityscapes DIR --darkzurich DIR --day-only     the baseline: labelled days alone
    python train.py --out OUT --resume                               go on from OUT/last.pt, to the same bits
    python train.py ... --init-from RUN/last.pt --out NEW            from its weights and step, another recipe
    torchrun --nproc_per_node=N train.py ...                         on N devices
    python train.py --benchmark                                      what a step costs beside a plain one

Writes OUT/last.pt (everything, to resume from), OUT/best.pt (what inference needs; chosen on labelled nights,
so report last.pt), OUT/log.csv, OUT/args.json and OUT/samples.png (night image | prediction | label).
"""

import argparse
import contextlib
import copy
import csv
import functools
import importlib.util
import io
import json
import math
import os
import random
import signal
import statistics
import sys
import time
import zlib
from pathlib import Path

import torch
from torch import distributed, nn
from torchvision.transforms.v2 import functional as TF
from torchvision.utils import make_grid

import ccdistill
import datasets
import evaluate
import models
from evaluate import ranks, say
from losses import segmentation_loss

try:
    import fcntl
except ImportError:  # Windows: two runs in one folder are not noticed there
    fcntl = None


def train(args, state=None):
    """One run, to OUT/last.pt at step --steps. state: the checkpoint that it goes on from."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(alone_in(args.out))
        stream, validation = load_data(args)
        same_files(stream, args)
        method, optimizer = build(args, state)
        check_data(stream, validation, args)
        start, rows = begin(method, optimizer, state, stream, validation, args)
        stop = stack.enter_context(stop_signals())  # until here there is nothing to save
        stack.callback(write_log, rows, Path(args.out, "log.csv"))  # however the run ends
        parallel = method.train().day if args.day_only else method.train()
        if args.processes > 1:  # the projection head rests until the targets join
            unused = args.adapt_from > 0
            parallel = nn.parallel.DistributedDataParallel(parallel, find_unused_parameters=unused)
        feed, began, last = batches(stream, start, args), time.monotonic(), Path(args.out, "last.pt")
        batch = next(feed, None)
        for step in range(start + 1, args.steps + 1):
            # Dropout and styles. The rest of a step's randomness is its samples', see datasets.FourDomains.
            torch.manual_seed(random.Random(f"{args.seed} {step} {ranks()[0]}").getrandbits(63))
            for group in optimizer.param_groups:
                group["lr"] = args.lr * (1 - (step - 1) / args.steps) ** args.power
            with autocast(args):
                terms = losses_of(parallel, batch, step, args)
            optimizer.zero_grad()
            terms["total"].backward()
            batch, unreadable = next_batch(feed)  # which the other processes learn with this step
            values, stopping = exchange(terms, method, bool(stop or unreadable), args)
            if bad := [name for name, value in values.items() if not math.isfinite(value)]:
                raise ValueError(f"step {step}: {bad[0]} is {values[bad[0]]}; a lower --lr may help")
            optimizer.step()

            rows.append({"step": step, "lr": optimizer.param_groups[0]["lr"]} | values)
            if step % args.log_every == 0 or step == args.steps:
                report(rows[-1], began, start, args)
            due = is_due(step, validation, args)
            if stopping or due or step % args.save_every == 0:
                save(checkpoint(args, rows, method, optimizer), last)
            if unreadable:
                raise unreadable
            if stopping:
                again = "the same command" if args.demo else f"train.py --out {args.out} --resume"
                say(f"stopped at step {step}; {again} goes on")
                sys.exit(128 + (stop or [signal.SIGTERM])[0])
            if ranks()[0] == 0:
                conclude(rows, due, method, optimizer, stream, validation, args)


def losses_of(parallel, batch, step, args):
    """The terms of a batch, with "total". parallel: the method, or with --day-only the network alone."""
    if args.day_only:
        loss = segmentation_loss(parallel(batch["source_day"])[1], batch["source_label"])
        return {"seg_day": loss, "total": loss}
    return parallel(batch, adapt=step > args.adapt_from * args.steps)


def exchange(terms, method, stop, args):
    """The one message of a step, from the device and between processes: (dict of the terms, their means over
    processes, and of the gradient's norm; does any process want to stop)."""
    numbers = {name: torch.as_tensor(term, device=args.device).detach() for name, term in terms.items()}
    numbers["gradient"] = nn.utils.get_total_norm([p.grad for p in method.parameters() if p.grad is not None])
    message = torch.stack([value.float() for value in numbers.values()])
    message = torch.cat([message, message.new_tensor([stop])])
    if args.processes > 1:
        distributed.all_reduce(message)
    *sums, stops = message.tolist()
    return dict(zip(numbers, [value / args.processes for value in sums], strict=True)), stops > 0


def next_batch(feed):
    """(next batch, None), or (None, the DataError of a sample that cannot be read)."""
    try:
        return next(feed, None), None
    except datasets.DataError as error:
        return None, error


def take_night_statistics(method, stream, args):
    """Give M_n the statistics of the last 100 steps' T_n, see `ccdistill.take_night_statistics`."""
    stream = copy.copy(stream)
    stream.targets_from, stream.synthetic = len(stream), None  # T_n is decoded, T_d not
    nights = (batch["target_night"] for batch in batches(stream, max(0, args.steps - 100), args))
    with autocast(args), torch.compiler.set_stance("force_eager"):
        ccdistill.take_night_statistics(method.night, nights)


def is_due(step, validation, args):
    return step == args.steps or bool(validation) and step % args.eval_every == 0


def conclude(rows, due, method, optimizer, stream, validation, args):
    """After the last step give M_n its statistics; validate it where that is due. The step is saved already,
    and a resumed run does this again for the step where it begins."""
    out, row, tiles = Path(args.out), rows[-1], []
    if row["step"] == args.steps and args.night_statistics == "target" and method.night is not method.day:
        take_night_statistics(method, stream, args)
        save(checkpoint(args, rows, method, optimizer), out / "last.pt")

    def each(item, prediction, _):
        if len(tiles) < 12:
            tiles.extend([item["image"], datasets.colourise(prediction), datasets.colourise(item["label"])])

    if validation and due:
        result = evaluate.evaluate(method.night, validation, args.device, args.workers, each)
        before = [old["miou_present"] or 0 for old in rows if "miou_present" in old and old is not row]
        row |= {name: result[name] for name in evaluate.MEANS}
        means = "  ".join(f"{name} {evaluate.percent(result[name]).strip()}" for name in evaluate.MEANS)
        say(f"step {row['step']}  at night: {means}")
        if not (out / "best.pt").exists() or (result["miou_present"] or 0) > max(before, default=-1):
            save(checkpoint(args, rows, method), out / "best.pt")
        write_log(rows, out / "log.csv")
        samples = grid(tiles, 3)
        datasets.write_whole(out / "samples.png", lambda file: TF.to_pil_image(samples).save(file, "PNG"))
    if args.tensorboard:
        writer = summary_writer(out / "tensorboard")
        for name, value in row.items():
            writer.add_scalar(name, value, row["step"])
        if tiles:
            writer.add_image("samples", samples, row["step"])
        writer.flush()


@functools.cache
def summary_writer(folder):
    """torch's own writer; one for a run, since each opens an event file of its own."""
    from torch.utils.tensorboard import SummaryWriter

    return SummaryWriter(folder)


def grid(tiles, columns):
    """(3, H, W) uint8 tiles as one picture, each in the shape of the first, at most 480 wide."""
    width = min(480, tiles[0].shape[2])
    size = [round(tiles[0].shape[1] * width / tiles[0].shape[2]), width]
    return make_grid([TF.resize(tile, size, TF.InterpolationMode.NEAREST) for tile in tiles], columns)


def report(row, began, start, args):
    """The progress line, with a dash for a term that does not exist (yet)."""
    step, later = row["step"], () if args.day_only else ("pseudo", "content", "style")
    terms = [f"{name} {value:.4g}" for name, value in row.items() if name != "step"]
    terms = "  ".join([*terms, *(f"{name} -" for name in later if name not in row)])
    rate, left = (step - start) / (time.monotonic() - began), args.steps - start
    say(f"step {step}/{args.steps}  {rate:.2f}/s  {evaluate.time_left(began, step - start, left)}  {terms}")


def autocast(args):
    return torch.autocast(torch.device(args.device).type, torch.bfloat16, enabled=args.amp == "bf16")


# ---- what a run is made of ---------------------------------------------------------------------------------


def build(args, state=None):
    """(method, optimizer) on their device: a CCDistill, or with --day-only the network alone, as M_d and M_n.
    With a state the initial weights are not read again."""
    torch.manual_seed(args.seed)
    if state:
        model = evaluate.rebuilt(state["path"], state)
    else:
        model = models.DeepLab(args.backbone, len(datasets.NAMES), args.output_stride, args.weights)
        say(f"network: {args.backbone}, output stride {args.output_stride}, weights: {args.weights}")
    method = nn.ModuleDict({"day": model, "night": model}) if args.day_only else ccdistill.CCDistill(
        model, args.night_weights, args.batch_norm, args.night_style, projection=not args.no_projection,
        content_weight=args.content_weight, style_weight=args.style_weight, js_weight=args.js_weight,
        pseudo_weight=args.pseudo_weight, pseudo_threshold=args.pseudo_threshold,
        target_paired=args.pairs != "none", mix=not args.no_mix,
    )  # fmt: skip
    method = method.to(args.device, memory_format=torch.channels_last)
    for network in {method.day, method.night} if args.compile else ():
        network.compile()
    parameters = [p for p in method.parameters() if p.requires_grad]
    # Norms and biases are spared from weight decay.
    groups = [{"params": [p for p in parameters if p.ndim > 1], "weight_decay": args.weight_decay}]
    groups.append({"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0})
    if args.optimizer == "sgd":  # not fused: that fails where some parameters have moments and others not yet
        return method, torch.optim.SGD(groups, args.lr, 0.9)
    return method, torch.optim.AdamW(groups, args.lr, fused=True)


def load_data(args):
    """(training stream, labelled validation nights) as the arguments say. Raises DataError."""
    if args.cache:
        evaluate.check_writable(args.cache, make=True)
    source = datasets.samples("cityscapes", args.cityscapes, "train", args.labels)
    if not source[0].label:
        raise datasets.DataError(f"{args.cityscapes}/gtFine/train: no such folder")
    say(f"source: {datasets.describe(source, args.cityscapes)}")
    layout, root = ("acdc", args.acdc) if args.acdc else ("darkzurich", args.darkzurich)
    days, nights, synthetic, validation = [], [], [], []
    joins = math.floor(args.adapt_from * args.steps)
    if not args.day_only:
        days, nights = datasets.targets(layout, root, args.pairs)
        how = "unpaired" if args.pairs == "none" else f"in pairs ({args.pairs})"
        say(f"target: {len(days)} days and {len(nights)} nights, {how}, in {root}")
        joining = f"source alone until step {joins}, then the targets join"
        say(joining if joins else "targets from the first step")
        synthetic = datasets.synthetic_nights(args.synthetic_night, source) if args.synthetic_night else []
        if args.batch_size == 1 and args.pairs == "none":
            say("warning: one unpaired image a domain: illumination (CDC) and CDS compare nothing")
    if root and not [*Path(root).glob("rgb_anon"), *Path(root).glob("*/rgb_anon")]:
        raise datasets.DataError(f"{root}: no folder rgb_anon in it, so no {layout} data")
    if root and datasets.find_folder(root, datasets.LAYOUTS[layout][2].format("val"), must_exist=False):
        validation = datasets.samples(layout, root, labels=args.labels)
    none = "none, the target has no labelled nights (gt/, val); no best.pt"
    say(f"validation: {datasets.describe(validation, root) if validation else none}")
    size = args.batch_size * args.processes
    stream = datasets.FourDomains(
        source, days, nights, args.crop, args.pairs != "none", synthetic, args.scale, args.seed,
        length=args.steps * size, cache=datasets.Cache(args.cache, args.scale[1]) if args.cache else None,
        targets_from=joins * size,
    )  # fmt: skip
    return stream, validation


def same_files(stream, args):
    """Note which files a run draws from; raise ValueError where a resumed one would draw from others."""
    domains = {
        "source images": [s.image for s in stream.source],
        "days": stream.days,
        "nights": stream.nights,
    }
    names = " ".join(path.name for paths in domains.values() for path in paths)
    files = ", ".join(f"{len(paths)} {name}" for name, paths in domains.items())
    files = f"{files} (names: {zlib.crc32(os.fsencode(names)):08x})"
    if args.resume and getattr(args, "files", files) != files:
        way_out = "bring the data back, or begin another run from there: --init-from FILE --out NEW"
        raise ValueError(f"{args.out}: the run saw {args.files}, now there are {files}; {way_out}")
    args.files = files


def check_data(stream, validation, args):
    """Read every image header once, by one process. Raises DataError."""
    if ranks()[0]:
        return
    groups = [(path,) for path in stream.nights + stream.days]
    groups = [*zip(stream.nights, stream.days, strict=True)] if stream.paired else groups
    ready = [(sample.image, night) for sample, night in zip(stream.source, stream.synthetic, strict=False)]
    datasets.check_sizes([*stream.source, *groups, *ready], args.crop, say)
    datasets.check_sizes(validation, say=say)
    for samples in filter(None, (stream.source, validation)):
        if warning := datasets.label_warning(samples):
            say(warning)


def batches(stream, start, args):
    """The stream from step `start` on, as dicts of device tensors: images float in [0, 1], labels int64. Of
    each step's samples every process takes its share."""
    size = args.batch_size
    firsts = range((start * args.processes + ranks()[0]) * size, len(stream), args.processes * size)

    def load(first):
        return torch.utils.data.default_collate([stream[k] for k in range(first, first + size)])

    for batch in datasets.ahead(load, firsts, args.workers):
        if args.device.startswith("cuda"):  # from pinned memory a copy does not wait for the device
            batch = {name: tensor.pin_memory() for name, tensor in batch.items()}
        label = batch.pop("source_label").to(args.device, non_blocking=True).long()
        images = {name: evaluate.to_float(image, args.device) for name, image in batch.items()}
        yield images | {"source_label": label}


# ---- checkpoints and the log -------------------------------------------------------------------------------


def checkpoint(args, rows, method, optimizer=None):
    """What evaluate.py needs of a run; with the optimizer, all that the rest of the run depends on: what is
    random in a step depends on seed and step alone."""
    step = rows[-1]["step"]
    state = {"format": evaluate.FORMAT, "args": json.loads(json.dumps(vars(args))), "step": step}
    state |= {"architecture": method.day.architecture, "model": method.state_dict()}
    if optimizer is None:
        kept = {k: v for k, v in state["model"].items() if k.startswith(("day.", "night."))}
        return state | {"model": kept}
    return state | {"optimizer": optimizer.state_dict(), "rows": rows}


def save(state, path):
    """Write a checkpoint, by one process, so that `path` always holds a whole one; beside last.pt its log."""
    if ranks()[0] == 0:
        torch.save(state, buffer := io.BytesIO())
        datasets.write_whole(path, lambda file: file.write(buffer.getbuffer()))
        write_log(state.get("rows"), path.with_name("log.csv"))


def write_log(rows, path):
    """The rows, a dict of numbers for each step, as a csv; a term that came later has empty cells before."""
    if rows and ranks()[0] == 0:
        names, text = dict.fromkeys(name for row in rows for name in row), io.StringIO()
        writer = csv.DictWriter(text, names, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        datasets.write_whole(path, lambda file: file.write(text.getvalue().encode()))


def begin(method, optimizer, state, stream, validation, args):
    """Put a checkpoint's content into its places and say where it starts. Returns (step, rows of the log)."""
    path, start, rows = Path(args.out, "args.json"), 0, []
    if state:
        weights, start = state["model"], state["step"]
        with evaluate.damaged_checkpoint(state["path"]):
            # Another recipe may have no projection head or teachers, or have them where that one had none.
            own = method.state_dict() if args.init_from else weights
            fits = {k: v for k, v in weights.items() if k in own and own[k].shape == v.shape}
            method.load_state_dict(fits, strict=not args.init_from)
            if args.resume:
                optimizer.load_state_dict(state["optimizer"])
                rows = state["rows"]
        how = "resumed" if args.resume else "begun, with a new optimizer,"
        say(f"{how} at step {start} of {state['path']}")
    if ranks()[0] == 0:
        datasets.write_whole(path, lambda file: file.write(json.dumps(vars(args), indent=1).encode()))
        if rows:  # a step is saved before its validation
            due = is_due(start, validation, args)
            conclude(rows, due, method, optimizer, stream, validation, args)
    if start == args.steps:
        say(f"{state['path']}: at step {start} of {args.steps} already, for evaluate.py")
    return start, rows


@contextlib.contextmanager
def alone_in(out):
    """Hold the folder by a lock that ends with the process. Raises ValueError if another run has it."""
    evaluate.check_writable(out, make=True)
    with open(Path(out, ".lock"), "w") as file:
        try:
            if fcntl and ranks()[0] == 0:
                fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            raise ValueError(f"{out}: another run is writing there; choose another --out") from None
        except OSError as error:
            raise ValueError(f"{out}: cannot be locked ({error.strerror}); choose another --out") from None
        yield


@contextlib.contextmanager
def stop_signals():
    """Ctrl-C, SIGTERM and a closed terminal put their number into the list that this yields; a second one
    interrupts at once."""
    stop = []

    def on_signal(number, _):
        if stop:
            raise KeyboardInterrupt
        stop.append(number)
        say("finishing this step, then saving (again: stop at once)")

    numbers = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]
    heeded = [number for number in numbers if signal.getsignal(number) is not signal.SIG_IGN]  # not by nohup
    handlers = {number: signal.signal(number, on_signal) for number in heeded}
    try:
        yield stop
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


# ---- arguments ---------------------------------------------------------------------------------------------

LR = {"adamw": 5e-4, "sgd": 2.5e-4}
DEMO = {"out": "runs/demo", "steps": 250, "batch_size": 4, "crop": (96, 192), "weights": "none"}
DEMO |= {"eval_every": 250, "save_every": 50}
# What a resumed run may change: where it runs, where its data and its results lie, how often it writes.
FREE = {"device", "workers", "compile", "cityscapes", "darkzurich", "acdc", "synthetic_night"}
FREE |= {"cache", "out", "resume", "init_from", "weights", "eval_every", "save_every", "log_every"}
FREE |= {"tensorboard", "benchmark"}


def arguments_parser():
    parser = evaluate.command_parser(__doc__)
    path, number, flag = evaluate.a_path, evaluate.number, "store_true"
    count, share, weight = number(1, 10**9, int), number(0, 1), number(0, 10**6)
    group = parser.add_argument_group("data")
    add, target = group.add_argument, group.add_mutually_exclusive_group().add_argument
    add("--cityscapes", type=path, help="labelled days: holds leftImg8bit/ and gtFine/ (labelIds)")
    target("--darkzurich", type=path, help="days and nights: holds rgb_anon/, corresp/, gt/val/")
    target("--acdc", type=path, help="ACDC night instead: rgb_anon/night/{train,train_ref}, gt/night/val/")
    add("--pairs", type=path, default="corresp", help="a csv of NIGHT,DAY lines; none: unrelated images")
    how = "which to read where a folder holds both kinds"
    add("--labels", choices=[*datasets.TABLES], default="labelTrainIds", help=how)
    add("--synthetic-night", type=path, help="ready-made nights, in leftImg8bit's tree")
    add("--crop", type=number(32, 10**5, int), nargs=2, default=(512, 512), help="height and width")
    add("--scale", type=number(0.01, 100), nargs=2, default=(0.5, 1.0), help="of the image before the crop")
    add("--cache", type=path, help="keep decoded images there (Cityscapes and Dark Zurich: 59 GB)")
    add("--workers", type=number(0, 256, int), default=processors(), help="decoding threads")

    add = parser.add_argument_group("network").add_argument
    add("--backbone", choices=models.BACKBONES, default="resnet18", help="torchvision's ResNet")
    add("--output-stride", type=int, choices=(8, 16), default=16, help="image size over feature size")
    add("--weights", type=path, default="imagenet", help="imagenet (downloaded once), none, or a file")
    add("--night-weights", choices=ccdistill.NIGHT_WEIGHTS, default="norm", help="what M_n and M_d share")
    add("--batch-norm", choices=ccdistill.BATCH_NORMS, default="domain", help="S and T apart (ours) or joint")

    add = parser.add_argument_group("method").add_argument
    add("--day-only", action=flag, help="the baseline: labelled source days alone")
    add("--night-style", choices=ccdistill.NIGHT_STYLES, default="random", help="how S_n is made (ours)")
    add("--content-weight", type=weight, default=1.0, help="of content distillation (CDC)")
    add("--style-weight", type=weight, default=1.0, help="of style distillation (CDS)")
    add("--js-weight", type=weight, default=0.1, help="of the divergences in CDC")
    add("--pseudo-weight", type=weight, default=1.0, help="of the pseudo-labels' loss")
    add("--pseudo-threshold", type=share, default=0.9, help="softmax of a confident prediction")
    add("--adapt-from", type=share, default=0.25, help="share of --steps before the targets join (ours)")
    add("--no-mix", action=flag, help="targets as the figure has them: no teacher, jitter, pasted objects")
    add("--no-projection", action=flag, help="embeddings are average-pooled features")
    how = "whose statistics M_n's batch norms end with; if not given target, with --no-mix source"
    add("--night-statistics", choices=("target", "source"), help=how)

    add = parser.add_argument_group("optimisation").add_argument
    add("--steps", type=count, default=50000, help="length of the run; --lr and --adapt-from go by it")
    add("--batch-size", type=count, default=2, help="images per domain and process")
    add("--optimizer", choices=[*LR], default="adamw", help="sgd: momentum 0.9")
    add("--lr", type=number(1e-12, 10**6), help="learning rate; if not given 5e-4, with sgd 2.5e-4")
    add("--weight-decay", type=weight, default=5e-4, help="of all parameters but norms and biases")
    add("--power", type=weight, default=0.9, help="of the polynomial decay of the rate; 0: constant")
    add("--amp", choices=("off", "bf16"), help="autocast; if not given bf16 on CUDA, off elsewhere")
    add("--compile", action=flag, help="torch.compile the networks")
    add("--seed", type=number(0, 2**63 - 1, int), default=0, help="of weights, samples, crops, dropout")

    group = parser.add_argument_group("run")
    add, start = group.add_argument, group.add_mutually_exclusive_group().add_argument
    mode = group.add_mutually_exclusive_group().add_argument
    add("--out", type=path, default="runs/ccdistill", help="where everything is written")
    start("--resume", nargs="?", const=True, type=path, help="go on from a last.pt, or that of --out")
    start("--init-from", type=path, help="a last.pt to start from, with the arguments given here")
    add("--device", type=evaluate.a_device, default=evaluate.best_device(), help="cuda, mps or cpu")
    add("--eval-every", type=count, default=500, help="steps between validations")
    add("--save-every", type=count, default=500, help="steps between checkpoints")
    add("--log-every", type=count, default=20, help="steps between progress lines")
    add("--tensorboard", action=flag, help="write the log there too, if the package is installed")
    mode("--demo", action=flag, help="draw a small city, compare; 250 steps, batch 4, crop 96 192, runs/demo")
    mode("--benchmark", type=count, nargs="?", const=20, help="time so many steps; without data, of the demo")
    return parser


def processors():
    """How many decoding threads this machine feeds, shared among the processes of a torchrun node."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    local = os.environ.get("LOCAL_WORLD_SIZE", "1")
    return min(8, max(1, cores // max(1, int(local) if local.isdecimal() else 1)))


def world_size():
    """How many processes torchrun has started, 1 without it. Raises ValueError on half of its variables."""
    numbers = {name: os.environ.get(name, "") for name in ("WORLD_SIZE", "RANK", "MASTER_PORT")}
    if numbers["WORLD_SIZE"] in ("", "1"):
        return 1
    wrong = [f"{name}={value}" for name, value in numbers.items() if not value.isdecimal()]
    wrong += [] if os.environ.get("MASTER_ADDR") else ["MASTER_ADDR="]
    if not wrong and int(numbers["RANK"]) >= int(numbers["WORLD_SIZE"]):
        wrong = [f"RANK={numbers['RANK']}"]
    if wrong:
        what = f"WORLD_SIZE={numbers['WORLD_SIZE']} is set, but {', '.join(wrong)}"
        raise ValueError(f"{what}: start with torchrun, or unset WORLD_SIZE")
    return int(numbers["WORLD_SIZE"])


def parse_args(argv):
    """(arguments, checkpoint to go on from or None). Layers: defaults, the demo's, those of the run that is
    resumed, what was given."""
    parser = arguments_parser()
    defaults, absent = vars(parser.parse_args([])), object()
    given = vars(parser.parse_args(argv, argparse.Namespace(**dict.fromkeys(defaults, absent))))
    given = {name: value for name, value in given.items() if value is not absent}
    demo = "demo" in given or ("benchmark" in given and "cityscapes" not in given)
    args, state = argparse.Namespace(**defaults | (DEMO if demo else {}) | given), None
    args.processes = world_size()
    if args.processes > 1 and args.device == "cuda":
        args.device = f"cuda:{os.environ.get('LOCAL_RANK', '0')}"
    args.lr = args.lr or LR[args.optimizer]
    args.amp = args.amp or ("bf16" if args.device.startswith("cuda") else "off")
    args.night_statistics = args.night_statistics or ("source" if args.no_mix else "target")
    if args.resume or args.init_from:
        args, state = going_on(args, given)
    args.crop, args.scale = tuple(args.crop), tuple(args.scale)
    if problem := contradiction(args):
        parser.error(problem)
    return args, state


def going_on(args, given):
    """(arguments, checkpoint) of a run that goes on from a last.pt. --resume: with its own arguments; only
    FREE ones may differ. --init-from: a new run; every difference is printed. Raises ValueError."""
    path = Path(args.resume if isinstance(args.resume, str) else args.init_from or args.out)
    path = path / "last.pt" if path.is_dir() or args.resume is True else path
    last = Path(args.out, "last.pt")
    if args.resume and not path.exists():
        raise ValueError(f"{path}: no such file, nothing to go on from; leave --resume out to begin")
    state = evaluate.checked(path, models.read_state(path)) | {"path": path}
    kinds = {"args": dict, "step": int, "optimizer": dict} | ({"rows": list} if args.resume else {})
    if [type(state.get(name)) for name in kinds] != [*kinds.values()]:
        raise ValueError(f"{path}: not a last.pt that a run can go on from ({', '.join(kinds)})")
    if args.resume and last.exists() and not path.samefile(last):
        raise ValueError(f"{args.out}: holds another run; choose another --out to go on from {path}")
    then, now = dict(state["args"]), json.loads(json.dumps(vars(args)))
    for run in (then, now):  # paths may differ, kinds may not
        run["target"] = "acdc" if run.get("acdc") else "darkzurich"
        run["pairs"] = run["pairs"] if run.get("pairs") in ("corresp", "none") else "a csv"
    asked = {*given, "processes"} | ({"target"} if {"acdc", "darkzurich"} & {*given} else set())
    differ = [n for n in now if n not in FREE and now[n] != then.get(n) and (n in asked or args.init_from)]

    def option(name):
        return name if name in ("target", "processes") else f"--{name.replace('_', '-')}"

    changes = "; ".join(f"{option(n)} {then.get(n)} there, {now[n]} here" for n in differ)
    if args.resume and differ:
        way_out = "leave it out, or begin another run from there: --init-from FILE --out NEW"
        way_out = "give torchrun as many" if "processes" in differ else way_out
        way_out = "choose another --out" if args.demo else way_out
        raise ValueError(f"{path}: another run: {changes}; {way_out}")
    if args.resume:
        here = {"out": args.out, "device": args.device}
        merged = vars(args) | state["args"] | given | here
        if not all(isinstance(row, dict) for row in state["rows"]) or type(merged["steps"]) is not int:
            raise ValueError(f"{path}: damaged checkpoint (rows, steps)")
        return argparse.Namespace(**merged), state
    if given.get("weights", "none") != "none":
        raise ValueError(f"--weights {args.weights}: the weights come from --init-from {path}; leave one out")
    if args.steps <= state["step"]:
        raise ValueError(f"{path}: is at step {state['step']}: give more --steps than that")
    if network := {"backbone", "output_stride"} & {*differ}:
        raise ValueError(f"{path}: holds another network: {option(min(network))} must agree")
    say(f"differs from {path}: {changes or 'nothing'}")
    return args, state


def contradiction(args):
    """What is wrong with the combination of arguments, as one line, or None."""
    alone, target = args.demo or (args.benchmark and not args.cityscapes), args.darkzurich or args.acdc
    own, new = args.demo or args.benchmark, not (args.resume or args.init_from)
    last, rests = Path(args.out, "last.pt"), [Path(args.out, name) for name in ("best.pt", "samples.png")]
    if not Path(args.out, ".lock").exists():  # a run that ended before its first save leaves these, and .lock
        rests += [Path(args.out, name) for name in ("log.csv", "args.json")]
    file = args.weights not in ("none", "imagenet") and not args.resume
    ready, pairs = args.synthetic_night, args.pairs not in ("corresp", "none")
    data = "--cityscapes DIR is needed, and --darkzurich DIR, --acdc DIR or --day-only (or --demo alone)"
    rules = (
        (last.exists() and not args.resume and not own, f"{last}: exists; --out {args.out} --resume alone goes on, or choose another --out"),
        (not last.exists() and not own and any(path.exists() for path in rests),
         f"{args.out}: holds best.pt, samples.png, log.csv or args.json, but no last.pt; choose another --out"),
        (file and not os.path.isfile(args.weights), f"--weights {args.weights}: no such file; imagenet, none or a file"),
        (not alone and not (args.cityscapes and (target or args.day_only)), data),
        (args.demo and (args.cityscapes or target or args.day_only or ready or pairs),
         "--demo draws its own data and trains day-only and the method on it: --demo and its --out, no other data"),
        (own and (args.processes > 1 or not new),
         "--demo and --benchmark start anew, in one process: no torchrun, --resume or --init-from"),
        (args.day_only and (ready or args.benchmark),
         "--day-only sees no night, and --benchmark compares with it: leave one out"),
        (args.scale[0] > args.scale[1], f"--scale wants MIN <= MAX, got {args.scale[0]} {args.scale[1]}"),
        (args.acdc and pairs, "--acdc pairs by name: --pairs corresp or none"),
        (args.tensorboard and not importlib.util.find_spec("tensorboard"),
         "--tensorboard needs one more package: pip install tensorboard"),
    )  # fmt: skip
    return next((message for wrong, message in rules if wrong), None)


def warn_if_bf16_is_slow(args):
    """A processor without bf16 instructions takes some 30 times as long; one convolution tells."""
    took = {}
    for dtype in (torch.float32, torch.bfloat16) * 2 if args.amp == "bf16" and args.device == "cpu" else ():
        convolution, x = nn.Conv2d(64, 64, 3, dtype=dtype), torch.rand(1, 64, 64, 64, dtype=dtype)
        began = time.perf_counter()
        convolution(x)
        took[dtype] = time.perf_counter() - began  # the second round counts
    if took and (ratio := took[torch.bfloat16] / took[torch.float32]) > 3:
        slow = f"bf16 takes {ratio:.0f} times as long as float32 on this processor"
        say(f"warning: {slow}: --amp off is faster")


# ---- demo and benchmark ------------------------------------------------------------------------------------


def demo(args):
    """Draw the demo city, train day-only and CCDistill on it for the same number of steps, compare them at
    night."""
    out, results, rows = Path(args.out), {}, {}
    use_demo_city(args, out / "city")

    def draw(item, prediction, _):
        row = rows.setdefault(item["name"], [item["image"], datasets.colourise(item["label"])])
        row.insert(-1, datasets.colourise(prediction))

    for name in ("day-only", "ccdistill"):
        run = argparse.Namespace(**vars(args) | {"out": str(out / name), "day_only": name == "day-only"})
        run.resume = Path(run.out, "last.pt").exists()  # an interrupted demo goes on
        say(f"\n{name}: {run.steps} steps")
        train(*going_on(run, vars(run)) if run.resume else [run])
        model, _ = evaluate.load_model(out / name / "last.pt", device=args.device)
        samples = datasets.samples("darkzurich", args.darkzurich)
        results[name] = evaluate.evaluate(model, samples, args.device, each=draw)
    tiles = [tile for row in list(rows.values())[:4] for tile in row]
    picture = TF.to_pil_image(grid(tiles, 4))
    datasets.write_whole(out / "comparison.png", lambda file: picture.save(file, "PNG"))
    say(f"\n{'at night':11} day-only  ccdistill\n{evaluate.table(*results.values())}")
    say(f"{out / 'comparison.png'}: night image, day-only, CCDistill, label")


def use_demo_city(args, city):
    with alone_in(city.parent):
        if not any(city.glob("darkzurich/corresp/train/night/*/*.csv")):  # the last thing to be written
            say(f"drawing a city into {city}")
            datasets.make_demo_city(city)
    args.cityscapes, args.darkzurich = str(city / "cityscapes"), str(city / "darkzurich")


def benchmark(args):
    """Time, in turn, a step of the method and a supervised step of the same network on as many images."""
    if not args.cityscapes:
        use_demo_city(args, Path(args.out, "city"))
    args.adapt_from, args.steps = 0, args.benchmark + 4
    stream, validation = load_data(args)
    method, optimizer = build(args)
    check_data(stream, validation, args)
    feed = batches(stream, 0, args)
    method.train()
    cuda, times = args.device.startswith("cuda"), {"plain_ms": [], "method_ms": [], "data_ms": []}

    def clock():
        if not args.device.startswith("cpu"):
            torch.accelerator.synchronize(args.device)
        return time.perf_counter() * 1000

    def loss(name, batch):
        if name == "method_ms":
            return method(batch)["total"]
        images = torch.cat([batch[d] for d in ("source_day", "source_day", "target_day", "target_night")])
        return segmentation_loss(method.day(images)[1], batch["source_label"].repeat(4, 1, 1))

    for n in range(-2, args.benchmark):  # two rounds to warm up
        took, began = {}, clock()
        batch = next(feed)
        took["data_ms"] = clock() - began
        for name in ("plain_ms", "method_ms") if n % 2 else ("method_ms", "plain_ms"):
            began = clock()
            with autocast(args):
                value = loss(name, batch)
            optimizer.zero_grad()
            value.backward()
            optimizer.step()
            took[name] = clock() - began
        for name in times if n >= 0 else ():
            times[name].append(took[name])
    ratios = [a / b for a, b in zip(times["method_ms"], times["plain_ms"], strict=True)]
    result = {name: statistics.median(values) for name, values in times.items()}
    result |= {"ratio": statistics.median(ratios), "ratio_min": min(ratios), "ratio_max": max(ratios)}
    result["images_per_second"] = 4000 * args.batch_size / (result["method_ms"] + result["data_ms"])
    result["peak_memory_mb"] = torch.cuda.max_memory_allocated() / 2**20 if cuda else process_memory()
    say("\n".join(f"{name:18} {value:10.2f}" for name, value in result.items()))


def process_memory():
    """Peak of this process in MB."""
    import resource  # not on Windows, where the rest runs

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)


def run(argv):
    args, state = parse_args(argv)
    warn_if_bf16_is_slow(args)
    torch.backends.cudnn.benchmark = True  # the crop is fixed
    if args.processes > 1:  # torchrun started several; the first one alone prints
        address = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        say(f"waiting for {args.processes - 1} more processes at {address}", sys.stderr)
        if cuda := args.device.startswith("cuda"):
            torch.cuda.set_device(args.device)
        with contextlib.ExitStack() as stack:  # it waits outside of Python, where no handler of ours runs
            for number in (signal.SIGINT, signal.SIGTERM):
                stack.callback(signal.signal, number, signal.signal(number, signal.SIG_DFL))
            try:
                distributed.init_process_group("nccl" if cuda else "gloo")
            except RuntimeError as error:
                why = models.one_line(error)[:200]
                raise ValueError(f"the processes do not meet at {address} ({why})") from None
        sys.stdout = open(os.devnull, "w") if ranks()[0] else sys.stdout  # noqa: SIM115
    demo(args) if args.demo else benchmark(args) if args.benchmark else train(args, state)


def main(argv=None):
    try:
        return evaluate.status_of("train.py", lambda: run(argv))
    finally:
        if ranks()[1] > 1:
            distributed.destroy_process_group()


if __name__ == "__main__":
    sys.exit(main())
