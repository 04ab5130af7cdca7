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
import models
from evaluate import MEANS, evaluate, grid, table
from losses import segmentation_loss

RANK, PROCESSES = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))  # torchrun's
STOPPED = []  # signals that ask to stop


def train(args):
    """One run, to OUT/night.pt after step --steps. Returns what `validate` does, by the first process."""
    stream, nights, validation = load_data(args)
    method, optimizer = build(args)
    if RANK == 0:
        claim(args)  # after whatever a wrong path ends
    start, rows = resume(method, optimizer, args)
    parallel = method.train()
    if PROCESSES > 1:  # the projection head rests until the targets join
        parallel = nn.parallel.DistributedDataParallel(method, find_unused_parameters=args.adapt_from > 0)
    if 0 < start < args.steps and start % args.eval_every == 0 and "miou" not in rows[-1]:
        validate(method, optimizer, validation, rows, args)  # it had been saved, but ended before

    feed, told = batches(stream, start, args), (start, time.monotonic())
    batch = next(feed, None)
    for step in range(start + 1, args.steps + 1):
        if isinstance(batch, Exception):
            break
        # Dropout, styles, pasting. The rest of a step's randomness is its samples', see datasets.FourDomains.
        torch.manual_seed(random.Random(f"{args.seed} {step} {RANK}").getrandbits(63))
        for group in optimizer.param_groups:
            group["lr"] = args.lr * (1 - (step - 1) / args.steps) ** args.power
        if args.compile:
            torch.compiler.cudagraph_mark_step_begin()
        with torch.autocast(torch.device(args.device).type, torch.bfloat16, enabled=args.amp == "bf16"):
            losses = parallel(batch, adapt=step > args.adapt_from * args.steps)
        optimizer.zero_grad()
        losses["total"].backward()
        batch = next(feed, None)  # all processes learn with this step whether it can be read
        row, stopping = exchange(losses, method, bool(STOPPED) or isinstance(batch, Exception))
        if not all(math.isfinite(value) for value in row.values()):
            raise FloatingPointError(f"step {step} is not finite ({row}); a lower --lr may help")
        optimizer.step()

        rows.append({"step": step, "lr": optimizer.param_groups[0]["lr"], **row})
        due = step % args.eval_every == 0 and step < args.steps
        if RANK == 0 and (due or stopping or step == args.steps):
            save(method, optimizer, rows, args)
        if step % args.log_every == 0 or step == args.steps:
            report(rows[-1], (step - told[0]) / (time.monotonic() - told[1]), args)
            told = step, time.monotonic()
        if due:
            validate(method, optimizer, validation, rows, args)
        if stopping:
            break
    if isinstance(batch, Exception):
        raise batch
    at_end = rows[-1]["step"] == args.steps and RANK == 0
    outcome = finish(method, optimizer, nights, validation, rows, args) if at_end else None
    if STOPPED:
        say("stopped; the same command with --resume goes on")
        sys.exit(128 + STOPPED[0])
    return outcome


def exchange(losses, method, stopping):
    """({name: mean over processes} of the losses and of the gradient's norm; does any process want to stop),
    by one message a step between processes and one wait for the device."""
    norm = nn.utils.get_total_norm([p.grad for p in method.parameters() if p.grad is not None])
    values = [*losses.values(), norm, torch.full_like(norm, stopping)]
    values = torch.stack([value.detach().float() for value in values])
    if PROCESSES > 1:
        distributed.all_reduce(values)
    *means, stops = (values / PROCESSES).tolist()
    return dict(zip([*losses, "gradient"], means, strict=True)), stops > 0


def say(text):
    with contextlib.suppress(OSError):  # a closed terminal or pipe ends no run
        print(text, flush=True)


def report(row, rate, args):
    """Print the progress line. rate: steps a second. Memory is the GPU's, at its peak."""
    step, memory = row["step"], torch.cuda.max_memory_allocated() / 2**20
    domains = 1 if args.day_only else 4 if step > args.adapt_from * args.steps else 2
    speed = f"{rate:.2f} steps/s  {rate * domains * args.batch_size * PROCESSES:.1f} images/s"
    terms = "  ".join(f"{name} {value:.4g}" for name, value in row.items() if name != "step")
    left = (args.steps - step) / rate / 60
    say(f"step {step}/{args.steps}  {left:.0f} min left  {speed}  {memory:.0f} MB of GPU  {terms}")


def validate(method, optimizer, validation, rows, args):
    """Score M_n at night, by one process, and save that: into the last row and OUT/samples.png. Returns the
    scores and [image, prediction, label] of four images, in one list."""
    if RANK or not validation:
        return None
    tiles = []

    def each(item, prediction, _):
        if len(tiles) < 12:
            tiles.extend([item["image"], datasets.colourise(prediction), datasets.colourise(item["label"])])

    with torch.compiler.set_stance("force_eager"):  # frames come in many sizes
        result = evaluate(method.night, validation, args.device, args.workers, each)
    rows[-1] |= {name: result[name] for name in MEANS}
    say("at night:  " + "  ".join(f"{name} {result[name]:.1f}" for name in MEANS))
    save(method, optimizer, rows, args, tiles)
    return result, tiles


def finish(method, optimizer, nights, validation, rows, args):
    """After the last step: M_n's statistics, its score, which is returned, and OUT/night.pt."""
    if args.night_statistics == "target":
        some = [datasets.Sample(night) for night in nights[:: math.ceil(len(nights) / 200)]]
        items = datasets.ahead(datasets.load, some, args.workers)
        images = (item["image"][None].to(args.device) / 255 for item in items)
        with torch.compiler.set_stance("force_eager"):
            ccdistill.take_night_statistics(method.night, images)
        save(method, optimizer, rows, args)
    outcome = validate(method, optimizer, validation, rows, args)
    replace(method.night.state_dict(), Path(args.out, "night.pt"))
    say(f"{args.out}/night.pt: M_n after {args.steps} steps")
    return outcome


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
    weights = "none" if Path(args.out, "last.pt").exists() else args.weights  # a resumed run has its own
    model = models.DeepLab(args.backbone, len(datasets.NAMES), args.output_stride, weights)
    method = DayOnly(model) if args.day_only else ccdistill.CCDistill(
        model, night_weights=args.night_weights, joint=args.batch_norm == "joint",
        night_style=args.night_style, projection=not args.no_projection,
        content_weight=args.content_weight, style_weight=args.style_weight,
        js_weight=args.js_weight, pseudo_weight=args.pseudo_weight, pseudo_threshold=args.pseudo_threshold,
        target_paired=args.pairs != "none", teacher=not args.no_teacher,
    )  # fmt: skip
    method = method.to(args.device, memory_format=torch.channels_last)
    if args.compile:  # on a GPU as CUDA graphs; on a CPU with eager's random numbers
        how = {"mode": "reduce-overhead"} if "cuda" in args.device else {"options": {"fallback_random": True}}
        for network in method.modules():  # and the teachers'
            if isinstance(network, models.DeepLab):
                network.compile(**how)
    parameters = [p for p in method.parameters() if p.requires_grad]
    return method, torch.optim.AdamW(parameters, args.lr, weight_decay=args.weight_decay, fused=True)


def load_data(args):
    """(training stream, paths of target nights, labelled validation nights)."""
    source = datasets.samples("cityscapes", args.cityscapes, "train")
    if not source[0].label:
        raise datasets.DataError(f"{args.cityscapes}: no gtFine/train with labels in it")
    synthetic = args.synthetic_night and datasets.synthetic_nights(args.synthetic_night, source)
    layout, root, days, nights, validation = args.target, args.acdc or args.darkzurich, [], [], []
    if not args.day_only:
        days, nights = datasets.targets(layout, root, args.pairs)
    elif args.night_statistics == "target":
        _, nights = datasets.targets(layout, root, "none")
    val = datasets.LAYOUTS[layout][0].format("val")
    # With --day-only nothing else has looked for root; listdir says so if it is not there.
    if root and os.listdir(root) and datasets.find(root, val, ".png", must_exist=False):
        validation = [sample for sample in datasets.samples(layout, root, "val") if sample.label]
    targets = f"{len(days)} target days and {len(nights)} nights ({args.pairs})"
    say(f"{len(source)} labelled days, {targets}, {len(validation)} labelled nights to validate")
    for labelled in (source, validation):
        if labelled and RANK == 0 and (warning := datasets.label_warning(labelled)):
            say(warning)
    size = args.batch_size * PROCESSES
    stream = datasets.FourDomains(
        source, days, nights, args.crop, args.pairs != "none", synthetic, args.scale, args.seed,
        length=args.steps * size, targets_from=math.floor(args.adapt_from * args.steps) * size,
    )  # fmt: skip
    return stream, nights, validation


def batches(stream, start, args):
    """The stream from step `start` on, as dicts of device tensors: images float in [0, 1], labels int64. Each
    process takes its share of a step's samples. What cannot be read is yielded as its error, at last."""
    size = args.batch_size
    firsts = range((start * PROCESSES + RANK) * size, len(stream), PROCESSES * size)

    def load(first):
        return torch.utils.data.default_collate([stream[k] for k in range(first, first + size)])

    cuda = args.device.startswith("cuda")  # a copy of pinned memory waits for nothing
    try:
        for batch in datasets.ahead(load, firsts, args.workers):
            batch = {name: x.pin_memory() if cuda else x for name, x in batch.items()}
            batch = {name: x.to(args.device, non_blocking=True) for name, x in batch.items()}
            yield {name: x.long() if name == "source_label" else x / 255 for name, x in batch.items()}
    except (datasets.DataError, OSError) as error:
        yield error


def save(method, optimizer, rows, args, tiles=None):
    """OUT/last.pt, OUT/log.csv and, of tiles, OUT/samples.png; one process calls it."""
    state = {"model": method.state_dict(), "optimizer": optimizer.state_dict(), "args": vars(args)}
    replace(state | {"rows": rows, "step": rows[-1]["step"]}, Path(args.out, "last.pt"))
    try:
        with open(Path(args.out, "log.csv"), "w", newline="") as file:
            writer = csv.DictWriter(file, dict.fromkeys(name for row in rows for name in row))
            writer.writeheader()
            writer.writerows(rows)
        if tiles:
            grid(tiles, 3).save(Path(args.out, "samples.png"))
    except OSError as error:  # another program may hold them open
        say(f"warning: {error}; the run goes on")


def replace(state, path):
    """Write a torch file beside `path`, which then takes its place: `path` never holds half of it."""
    aside = Path(f"{path}.tmp")
    torch.save(state, buffer := io.BytesIO())  # on a full disk torch itself names no reason
    try:
        aside.write_bytes(buffer.getbuffer())
        aside.replace(path)
    except OSError as error:
        aside.unlink(missing_ok=True)
        raise OSError(f"{path}: not written ({error.strerror}); what it held is still whole") from None


# What a resumed run may change: the machine, messages, where files lie.
FREE = {"out", "resume", "device", "workers", "compile", "log_every", "eval_every", "weights"}
FREE |= {"cityscapes", "darkzurich", "acdc", "synthetic_night", "pairs"}


def claim(args):
    """Make OUT this run's by a new OUT/args.json, which only one process can create. With --resume it may be
    there, of the same arguments."""
    path, now = Path(args.out, "args.json"), vars(args)
    if args.resume and path.exists() and (text := path.read_text()):
        then = json.loads(text)
        if differ := [name for name in now if name not in FREE and then.get(name) != now[name]]:
            told = ", ".join(f"{name} {then.get(name)} there, {now[name]} here" for name in differ)
            raise datasets.DataError(f"{path}: is of another run: {told}")
        return
    held = [name for name in ("args.json", "last.pt", "night.pt", "log.csv") if Path(args.out, name).exists()]
    if held and not (args.resume and held == ["args.json"]):  # an empty one is of a start that was killed
        way_out = "choose another --out" if args.resume else "add --resume, or choose another --out"
        raise datasets.DataError(f"{args.out}: holds {held[0]}: {way_out}")
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w" if held else "x") as file:
        json.dump(now, file, indent=1)


def resume(method, optimizer, args):
    """With --resume, put OUT/last.pt into its places, if there is one. Returns (its step, the log's rows)."""
    path = Path(args.out, "last.pt")
    if not (args.resume and path.exists()):
        return 0, []
    state = models.read_file(path)
    method.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    say(f"resumed at step {state['step']} of {path}")
    return state["step"], state["rows"]


def parse_args(argv=None):
    parser = argparse.ArgumentParser(
        usage="python train.py --cityscapes DIR --darkzurich DIR [options]", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False,
    )  # fmt: skip
    data = parser.add_argument_group("data")
    add, target = data.add_argument, data.add_mutually_exclusive_group().add_argument
    add("--cityscapes", metavar="DIR", help="labelled days: holds leftImg8bit/ and gtFine/")
    target("--darkzurich", metavar="DIR", help="days and nights: holds rgb_anon/, corresp/, gt/val/")
    target("--acdc", metavar="DIR", help="ACDC night: holds rgb_anon/night/, gt/night/val/")
    target("--demo", action="store_true", help="draw a small city, compare day-only and the method on it")
    add("--pairs", default="corresp", help="a csv of NIGHT,DAY lines; none: unrelated images")
    add("--synthetic-night", metavar="DIR", help="ready-made nights, in leftImg8bit's tree")
    add("--crop", type=int, nargs=2, default=[512, 512], help="height and width (512 512)")
    add("--scale", type=float, nargs=2, default=[0.5, 1.0], help="random resizing before the crop (0.5 1)")
    add("--workers", type=int, default=min(8, os.cpu_count() or 1), help="decoding threads")
    add = parser.add_argument_group("network").add_argument
    add("--backbone", choices=[*models.BACKBONES], default="resnet18", help="of torchvision (resnet18)")
    add("--output-stride", type=int, choices=(8, 16), default=16, help="image size over feature size (16)")
    add("--weights", default="imagenet", help="imagenet (the default, downloaded once), none, or a file")
    add("--night-weights", choices=ccdistill.NIGHT_WEIGHTS, default="norm", help="norm: all but norms shared")
    add("--batch-norm", choices=("domain", "joint"), default="domain", help="of each domain, or S with T")
    add = parser.add_argument_group("method").add_argument
    add("--day-only", action="store_true", help="the baseline: labelled source days alone")
    add("--night-style", choices=ccdistill.NIGHT_STYLES, default="random", help="how S_n is made (random)")
    add("--content-weight", type=float, default=1.0, help="of content distillation, CDC (1)")
    add("--style-weight", type=float, default=1.0, help="of style distillation, CDS (1)")
    add("--js-weight", type=float, default=0.01, help="of the divergences in CDC (0.01)")
    add("--pseudo-weight", type=float, default=1.0, help="of the pseudo-labels' loss (1)")
    add("--pseudo-threshold", type=float, default=0.9, help="softmax of a confident prediction (0.9)")
    add("--adapt-from", type=float, default=0.25, help="share (0 to 1) of --steps before targets join")
    add("--no-teacher", action="store_true", help="no averaged teacher, pasting or strong colours")
    add("--no-projection", action="store_true", help="embeddings are average-pooled features")
    add("--night-statistics", choices=("target", "source"), help="of batch norms at M_n's end")
    add = parser.add_argument_group("run").add_argument
    add("--out", metavar="DIR", default="runs/ccdistill", help="where everything is written")
    add("--resume", action="store_true", help="go on from OUT/last.pt, or begin if there is none")
    add("--steps", type=int, default=50000, help="(%(default)s)")
    add("--batch-size", type=int, default=2, help="images per domain and process (%(default)s)")
    add("--lr", type=float, default=5e-4, help="learning rate of AdamW (%(default)s)")
    add("--weight-decay", type=float, default=5e-4, help="of AdamW (%(default)s)")
    add("--power", type=float, default=0.9, help="of the polynomial decay of the rate (%(default)s)")
    add("--amp", choices=("off", "bf16"), help="mixed precision (bf16 on a GPU, else off)")
    add("--compile", action="store_true", help="torch.compile the networks")
    add("--seed", type=int, default=0)
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--eval-every", type=int, default=500, help="steps between validations and saves (%(default)s)")
    add("--log-every", type=int, default=20, help="steps between progress lines (%(default)s)")
    if "--demo" in (sys.argv if argv is None else argv):
        shown = {"out": "runs/demo", "steps": 250, "batch_size": 4, "crop": [96, 192], "weights": "none"}
        parser.set_defaults(eval_every=250, **shown)
    args = parser.parse_args(argv)
    if args.demo and (args.cityscapes or args.day_only or PROCESSES > 1):
        parser.error("--demo draws its own data and trains day-only and the method on it, in one process")
    day_alone = args.day_only and args.night_statistics != "target"
    if not args.demo and not (args.cityscapes and (args.darkzurich or args.acdc or day_alone)):
        parser.error("give --cityscapes DIR and (but for plain --day-only) --darkzurich or --acdc; or --demo")
    if not 0 <= args.adapt_from <= 1:
        parser.error("--adapt-from is a share of the steps, 0 to 1")
    shared = args.night_weights == "shared"
    if args.night_statistics == "target" and shared:
        parser.error("--night-statistics target needs norms of M_n's own: no --night-weights shared")
    args.amp = args.amp or ("bf16" if args.device.startswith("cuda") else "off")
    of_source = args.day_only or args.no_teacher or shared
    args.night_statistics = args.night_statistics or ("source" if of_source else "target")
    args.paired = args.pairs if args.pairs in ("corresp", "none") else "csv"
    args.target, args.ready_made = "acdc" if args.acdc else "darkzurich", bool(args.synthetic_night)
    args.processes = PROCESSES
    return args


def demo(args):
    """Draw the demo city, train day-only and CCDistill on it for as many steps, compare them at night."""
    out, city, outcomes = Path(args.out), Path(args.out, "city"), []
    args.cityscapes, args.darkzurich, args.resume = f"{city}/cityscapes", f"{city}/darkzurich", True
    if not any(city.glob("darkzurich/corresp/train/night/*/*.csv")):  # the last thing to be written
        say(f"drawing a city into {city}")
        datasets.make_demo_city(city)
    for name in ("day-only", "ccdistill"):
        say(f"\n{name}: {args.steps} steps")
        run = argparse.Namespace(**vars(args) | {"out": str(out / name), "day_only": name == "day-only"})
        run.night_statistics = "source" if run.day_only else args.night_statistics
        outcomes.append(train(run))
    (day_only, tiles), (method, its_tiles) = outcomes
    rows = zip(tiles[0::3], tiles[1::3], its_tiles[1::3], tiles[2::3], strict=True)
    grid([tile for row in rows for tile in row], 4).save(out / "comparison.png")
    say(f"\n{'at night':14}   day-only  ccdistill\n{table(day_only, method)}")
    say(f"{out / 'comparison.png'}: night image, day-only, CCDistill, label")


def on_signal(number, _):
    if STOPPED and number == signal.SIGINT:
        raise KeyboardInterrupt
    STOPPED.append(number)
    say("finishing this step, then saving (Ctrl-C again: stop at once)")


def main(argv=None):
    args = parse_args(argv)
    torch.backends.cudnn.benchmark = True  # the crop is fixed
    if PROCESSES > 1 and args.device == "cuda":
        args.device = f"cuda:{os.environ['LOCAL_RANK']}"
    if args.device.startswith("cuda:"):
        torch.cuda.set_device(args.device)
    if PROCESSES > 1:
        distributed.init_process_group("nccl" if args.device.startswith("cuda") else "gloo")
        sys.stdout = open(os.devnull, "w") if RANK else sys.stdout  # noqa: SIM115
    for name in ("SIGINT", "SIGTERM", "SIGHUP"):
        number = getattr(signal, name, None)
        if number and signal.getsignal(number) is not signal.SIG_IGN:  # nohup's
            signal.signal(number, on_signal)
    run = demo if args.demo else train
    run(args)
    if PROCESSES > 1:
        distributed.destroy_process_group()


if __name__ == "__main__":
    try:
        main()
    except (datasets.DataError, models.WeightsError, FloatingPointError, OSError) as error:
        print(f"train.py: error: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)
