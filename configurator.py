"""
How a script starts and ends: settings, device, processes, signals, errors.

A script's settings are the globals at its top. Config files and flags override them, in the order given:

    python train.py config/train_shakespeare_char.py --batch_size=32 compile=False --device cpu --eval_only

Config files are Python: they may import, compute, and use the settings before them. Flags are literals. The names and
types of both are checked, and a mistake is answered with the closest setting.
"""

import ast
import contextlib
import ctypes
import datetime
import difflib
import errno
import functools
import glob
import math
import os
import re
import shlex
import shutil
import signal
import sys
import time

# OpenMP threads that wait spin only briefly (libgomp's variable): next to one busy process, the default makes training
# and generation 10 to 50 times slower. Generation spins longer: it waits after every matmul, and waking threads is slow
spin_count = {"train.py": "5000", "sample.py": "20000"}.get(os.path.basename(sys.argv[0]))
if spin_count and not os.environ.keys() & {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT"}:
    os.environ["GOMP_SPINCOUNT"] = spin_count

# huge pages for large tensors on Linux (PyTorch's variable): fewer TLB misses when a step reads all weights
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")

# Ctrl-C while torch is imported, which takes seconds, ends the script without a traceback
interruptible = signal.getsignal(signal.SIGINT) is signal.default_int_handler  # nohup ignores it
if interruptible:
    signal.signal(signal.SIGINT, lambda *_: os._exit(130))

import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402

from data.tokenizer import as_value_error, for_terminal  # noqa: E402

if interruptible:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# -----------------------------------------------------------------------------
# errors


def first_line(error):
    """Return the first line of an exception's message, or its type.

    Example: ValueError("a\\nb") -> "a"
    """
    return str(error).strip().split("\n")[0] or type(error).__name__


def fail(message):
    """Print one line that says what is wrong and what to type, and exit with 2 (wrong usage)."""
    print("error:", for_terminal(" ".join(str(message).split())), file=sys.stderr)
    sys.exit(2)


@contextlib.contextmanager
def usage_errors(problem=""):
    """Turn errors about input and memory into fail()'s one line; with `problem`, all errors, prefixed with it."""
    try:
        with as_value_error(problem) if problem else contextlib.nullcontext():
            yield
    except (ValueError, OSError, RuntimeError, MemoryError, OverflowError) as e:
        is_file_error = isinstance(e, OSError) and e.filename
        fail(f"{e.strerror}: {e.filename}" if is_file_error else first_line(e))


def report_error(kind, error, trace):
    """Serve as sys.excepthook: one line for Ctrl-C and lack of memory or disk space, a traceback for bugs."""
    if kind is KeyboardInterrupt:
        print(file=sys.stderr)
        sys.exit(130)
    if issubclass(kind, OSError) and error.errno == errno.ENOSPC:
        fail(error)
    if issubclass(kind, MemoryError) or re.search("out of memory|allocate|Storage size", first_line(error)):
        reason = ". ".join(first_line(error).split(". ")[:2])
        fail(f"out of memory ({reason}): lower --batch_size, --block_size, the model or, in sample.py, --num_samples")
    sys.__excepthook__(kind, error, trace)


sys.excepthook = report_error  # now, because the scripts import more


def print0(text, progress=False):
    """Print on rank 0. On a terminal the next text replaces a progress line."""
    if os.environ.get("RANK", "0") != "0":
        return
    end, text = "\n", for_terminal(text)
    if sys.stdout.isatty():
        width = shutil.get_terminal_size().columns - 1
        text = "\r".ljust(width + 1) + "\r" + (text[:width] if progress else text)
        end = "" if progress else "\n"
    with contextlib.suppress(OSError):  # a closed terminal or pipe does not end a run
        print(text, end=end, flush=True)


def exit_quietly_on_closed_pipe():
    """Let `script | head` end the script without a traceback."""
    if hasattr(signal, "SIGPIPE"):
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)


# -----------------------------------------------------------------------------
# settings

# other programs' names of settings
SYNONYMS = {
    "lr": "learning_rate", "epochs": "max_iters", "steps": "max_iters", "max_steps": "max_iters", "model": "init_from",
    "data": "dataset", "prompt": "start sample_prompt", "length": "max_new_tokens block_size",
}  # fmt: skip
# environment variables that change defaults
ENVIRONMENT = {"wandb_project": "WANDB_PROJECT", "save_interval": "SAVE_INTERVAL", "dtype": "MIXED_PRECISION"}
MIXED_PRECISION = {"true": "auto", "false": "float32", "no": "float32", "bf16": "bfloat16", "fp16": "float16"}


def configure(script):
    """Override a script's settings, given as its globals(), from the environment and sys.argv.

    Returns (settings as a dict, names set explicitly by a config file or a flag). A setting is a global with a
    lower-case name, no leading underscore, and an int, float, bool or str as its value.
    """
    repair_streams()

    # the defaults, first changed by the environment
    defaults = {k: v for k, v in script.items() if k[0] != "_" and k.islower() and type(v) in (int, float, bool, str)}
    settings = defaults | read_environment(defaults)
    args, explicit = sys.argv[1:], set()
    if "--help" in args or "-h" in args:
        print_help(script, settings)
        sys.exit(0)

    # config files and flags, in order
    while args:
        arg = args.pop(0)
        if arg.startswith("-") or "=" in arg:
            values = read_flag(arg, args, settings)
        else:
            values = read_config(arg, script, settings, explicit)
        settings |= values
        explicit |= values.keys()
    script.update(settings)
    folder = os.path.normpath(settings.get("dataset", ""))
    if folder.startswith("data" + os.sep) and not os.path.isdir(os.path.join("data", folder)):
        fail(f"--dataset is a folder in data/: try {shlex.quote('--dataset=' + folder[5:])}")

    # say what differs from the defaults
    changed = [f"{k}={v!r}" for k, v in settings.items() if k in explicit and v != defaults[k]]
    if changed and os.environ.get("RANK", "0") == "0":
        print(f"settings: {', '.join(changed)}", file=sys.stderr)
    return settings, explicit


def repair_streams():
    """Replace standard streams that are closed; print "?" for characters that a stream cannot encode."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode))
        elif hasattr(getattr(sys, name), "reconfigure"):
            getattr(sys, name).reconfigure(errors="replace" if mode == "w" else "surrogateescape")


def read_environment(defaults):
    """Return {setting: value} for the ENVIRONMENT variables that are set."""
    values = {}
    for key, variable in ENVIRONMENT.items():
        text = os.environ.get(variable, "").strip()
        if not text or key not in defaults:
            continue
        if key == "dtype":
            text = MIXED_PRECISION.get(text.lower(), text)
        values[key] = convert(key, parse(text, defaults[key]), defaults[key], variable)
    return values


def read_flag(arg, rest, settings):
    """Return {setting: value} for --key=value, key=value, --key value, or --key of a boolean.

    Takes the value of `--key value` out of rest, the arguments that follow.
    """
    # the name may have dashes for underscores
    name, equals, text = arg.partition("=")
    key = name.lstrip("-").replace("-", "_")
    if key not in settings:
        fail(unknown_setting(key or arg, settings))
    # the value follows, unless this is the flag of a boolean
    if not equals:
        is_flag = isinstance(settings[key], bool)
        if is_flag and not (rest and rest[0].lower() in ("true", "false", "1", "0")):
            text = "True"
        elif rest and not rest[0].startswith("--"):
            text = rest.pop(0)
        else:
            fail(f"{arg} needs a value: {arg}=...")
    return {key: convert(key, parse(text, settings[key]), settings[key], f"--{key}")}


def parse(text, default):
    """Return a flag's text as a value: a Python literal, or the text itself where that is expected.

    Example: "1e4", 100 -> 10000.0; "false", True -> False; "1e4", "out" -> "1e4"
    """
    if isinstance(default, bool):
        return {"true": True, "1": True, "false": False, "0": False}.get(text.lower(), text)
    if isinstance(default, str) and text[:1] not in ("'", '"'):
        return text
    try:
        return ast.literal_eval(text)
    except (ValueError, TypeError, SyntaxError, RecursionError, MemoryError):
        return text


def convert(key, value, default, source):
    """Return the value in the default's type, or fail(). An int may stand for a float, 1e4 for an int, and 0 for False.

    Example: 1, 0.1 -> 1.0; 1e4, 100 -> 10000
    """
    # numbers that are equal in the other type
    kind = type(default)
    if kind is float and type(value) is int and abs(value) < 2**63:
        value = float(value)
    if kind is int and type(value) is float and value.is_integer():
        value = int(value)
    if kind is bool and type(value) is int and value in (0, 1):
        value = bool(value)
    # a value of the type, finite and in 64 bits
    if type(value) is int and abs(value) >= 2**63:
        fail(f"{source}: {key} is too large")
    if type(value) is not kind or kind is float and not math.isfinite(value):
        expected = {int: "an integer", float: "a number", bool: "True or False", str: "text"}[kind]
        fail(f"{source}: {key} must be {expected} such as {default!r}, got {value!r:.40}")
    return value


def unknown_setting(key, known):
    """Return the message for an unknown setting.

    Example: "n_layers", ["n_layer"] -> "unknown setting n_layers (did you mean n_layer?)"
    """
    synonyms = [name for name in SYNONYMS.get(key, "").split() if name in known]
    near = synonyms or difflib.get_close_matches(key, known, n=1)
    return f"unknown setting {key}" + (f" (did you mean {near[0]}?)" if near else " (--help lists all)")


class Assigned(dict):
    """A namespace that records which names are assigned in it."""

    def __init__(self, names):
        super().__init__(names)
        self.assigned = set()

    def __setitem__(self, name, value):
        self.assigned.add(name)
        super().__setitem__(name, value)


def read_config(path, script, settings, explicit):
    """Run a config file; return the settings that it assigned or changed, checked.

    It sees the script's globals, the settings, and those set before it as a dict, `given`. Settings of train.py that
    the running script lacks are skipped, so that one file serves every script. Other names are helper variables of the
    file, unless they look like a misspelled setting.
    """
    if path.endswith(".pt") or os.path.isdir(path) or not os.path.exists(path):
        fail(f"no config file {path}" + config_hint(path, settings))
    with usage_errors(), open(path, "rb") as f:
        source = f.read()

    # run it, in a namespace that records assignments
    after = Assigned(script | settings | {"given": {name: settings[name] for name in explicit}})
    try:
        exec(compile(source, path, "exec"), after)
    except KeyboardInterrupt:
        raise
    except BaseException as e:  # SystemExit and RecursionError, too
        fail(f"{path}: {type(e).__name__}: {e}")

    # compare values, too: what a function assigns through `global` is not recorded
    changed = {name for name in settings if after.get(name) is not settings[name]} | after.assigned
    train_settings = setting_lines(os.path.join(os.path.dirname(os.path.abspath(__file__)), "train.py"))
    for name in sorted(changed - settings.keys() - {name for name, *_ in train_settings}):
        is_variable = isinstance(after.get(name), (int, float, str)) and not name.startswith("_")
        if is_variable and difflib.get_close_matches(name, settings, cutoff=0.75):
            fail(f"{path}: {unknown_setting(name, settings)}; begin a helper variable's name with _: _{name}")
    return {name: convert(name, after.get(name), settings[name], path) for name in sorted(changed & settings.keys())}


def config_hint(path, known):
    """Guess which flag or config files a wrong config path stands for.

    Example: "out", {"out_dir": ...} -> " (did you mean --out_dir=out?)"
    """
    if " " in path and not path.endswith(".py"):
        return '; a text is given as --start="..."'
    near = glob.glob(os.path.join(glob.escape(path), "*.py"))  # all files of a folder
    near = sorted(near) or difflib.get_close_matches(path, glob.glob("config/*.py"), n=1, cutoff=0.3)
    if not path.endswith(".py"):
        is_run = path.startswith("out") or os.path.exists(os.path.join(path, "ckpt.pt"))
        flags = {"init_from": path.endswith(".pt"), "dataset": os.path.isdir(f"data/{path}"), "out_dir": is_run}
        near = [shlex.quote(f"--{name}={path}") for name in flags if flags[name] and name in known] or near
    return f" (did you mean {' or '.join(near)}?)" if near else ""


def inherit(settings, explicit, saved, source):
    """Take over the settings of a checkpoint, except explicit ones; returns the changes as "name old -> new"."""
    # these five belong to one start only; nanoGPT's checkpoints have settings that are unknown here
    names = settings.keys() - {"init_from", "out_dir", "device", "backend", "eval_only"}
    saved = {k: v for k, v in saved.items() if k in names and type(v) in (int, float, bool, str)}
    for name in saved.keys() - explicit:
        settings[name] = convert(name, saved[name], settings[name], source)
    changed = [name for name in sorted(saved) if saved[name] != settings[name]]
    return [f"{name} {saved[name]} -> {settings[name]}" for name in changed]


def check_minimum(settings, minimum, *names):
    """fail() if one of the named settings is below the minimum."""
    for name in names:
        if settings[name] < minimum:
            fail(f"--{name} must be at least {minimum}, got {settings[name]}")


def check_choice(settings, name, *choices):
    """fail() if a setting is not one of the choices."""
    if settings[name] not in choices:
        fail(f"--{name} must be one of {', '.join(choices)}, got {settings[name]}")


def match_model(settings, explicit, model_fields, init_from):
    """Set the settings to what the model has; fail() if one that was set explicitly differs.

    n_hidden=0 and n_kv_head=0 stand for values that follow from the other settings.
    """
    for name in settings.keys() & model_fields.keys():
        wanted, actual = settings[name], model_fields[name]
        is_derived = name in ("n_hidden", "n_kv_head") and wanted == 0
        if name in explicit and wanted != actual and not is_derived:
            fail(f"--{name}={wanted} was given, but the model of {init_from} has {actual}")
        settings[name] = actual


# -----------------------------------------------------------------------------
# help


def setting_lines(path):
    """Return the settings at the top of a script, and the titles between them: [(name, default, comment, title)].

    They are the lines `name = default  # comment` and `# title` before the last rule (# ---) above configure().
    """
    with open(path, encoding="utf-8") as f:
        top = f.read().partition(" = configure(")[0].rpartition("# ---")[0]
    # a comment below a rule is the title of the section
    return re.findall(r"^(?:(\w+) = (.+?)(?:  # (.*))?|(?<!-\n)# (\w.*))$", top, re.MULTILINE)


def print_help(script, settings):
    """Print the script's docstring, its settings with their defaults and comments, and the config files."""
    exit_quietly_on_closed_pipe()
    print((script["__doc__"] or "").strip() + "\n\nsettings:")
    for name, default, comment, title in setting_lines(script["__file__"]):
        if name in ENVIRONMENT:
            value = os.environ.get(ENVIRONMENT[name], "").strip()
            default = repr(settings[name]) if value else default
            comment += f" [env: {ENVIRONMENT[name]}{'=' + value if value else ''}]"
        flag = f"  --{name}={default}"
        print(f"\n{title}" if title else f"{flag:<42} {comment}".rstrip())

    print("\nconfig files:")
    for path in sorted(glob.glob("config/*.py")):
        with open(path, encoding="utf-8") as f:
            title = f.readline().strip("# :\n")
        print(f"  {path:<40} {title}")


# -----------------------------------------------------------------------------
# device and dtype


def pick_device(device="auto", dtype="auto", tuned=True):
    """Resolve 'auto' to the best this machine has, and set up PyTorch for it.

    Returns (device, dtype, a line that says what was picked and why). device: cuda, cuda:1, mps or cpu; dtype: of
    matmuls. tuned=False leaves the memory allocator as it is, to measure other programs.
    """
    check_choice({"dtype": dtype}, "dtype", "auto", "float32", "bfloat16", "float16")
    # torchrun gives each process on a node a GPU of its own
    if device in ("auto", "cuda") and torch.cuda.is_available():
        device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
    if device == "auto":
        device = "mps" if torch.backends.mps.is_available() else "cpu"
    if not re.fullmatch(r"cuda(:\d{1,4})?|(mps|cpu)(:0)?", device):
        fail(f"--device must be auto, cuda, cuda:1, mps or cpu, got {device}")

    # the best dtype, and why
    if device.startswith("cuda"):
        best, reason, name = set_up_cuda(device)
    elif device.startswith("mps"):
        if not torch.backends.mps.is_available():
            fail("this PyTorch cannot use an Apple GPU: try --device=auto")
        best, reason, name = "float32", "half precision is unreliable on mps", "Apple GPU"
    else:
        best, reason = ("bfloat16", "AVX512-BF16 or AMX") if has_fast_bfloat16() else ("float32", "no fast bfloat16")
        name = f"{torch.get_num_threads()} threads"
        if tuned:
            keep_freed_memory()
        if dtype == "float16":
            dtype, best, reason = "auto", "float32", "CPUs are slow in float16"
    if dtype != "auto":
        best, reason = dtype, "as set"
    return device, best, f"{device} ({name}), dtype {best} ({reason})"


def set_up_cuda(device):
    """Select a CUDA device; returns (best dtype, why, name of the GPU)."""
    if not torch.cuda.is_available():
        fail(f"this PyTorch ({torch.__version__}) cannot use a CUDA GPU: try --device=auto")
    if int(device.partition(":")[2] or 0) >= torch.cuda.device_count():
        fail(f"no {device}: PyTorch sees {torch.cuda.device_count()} GPU(s), the first is cuda:0")
    torch.cuda.set_device(device)
    torch.set_float32_matmul_precision("high")  # TF32
    name = torch.cuda.get_device_name(device)
    if torch.cuda.is_bf16_supported(including_emulation=False):
        return "bfloat16", "native", name
    return "float16", "no bfloat16 before Ampere; the loss is scaled", name


def has_fast_bfloat16():
    """Return whether the CPU has instructions for bfloat16 matmuls. Known on Linux, assumed absent elsewhere."""
    with contextlib.suppress(OSError), open("/proc/cpuinfo") as f:
        return re.search("avx512_bf16|amx_bf16", f.read()) is not None
    return False


def keep_freed_memory():
    """Make glibc keep the memory of freed tensors.

    By default it returns large blocks to the kernel, which has to clear them page by page when the next step
    allocates them again: up to a quarter of the time per step.
    """
    if sys.platform == "linux":
        mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
        # M_MMAP_THRESHOLD is -3 and M_TRIM_THRESHOLD -1 in malloc.h; before glibc 2.35 the first was 32 MiB at most
        if mallopt and (mallopt(-3, 1 << 30) or mallopt(-3, 1 << 25)):
            mallopt(-1, 2**31 - 1)


def can_compile(device):
    """Try torch.compile on one addition; print one line if it fails (no C++ compiler, Windows)."""
    try:
        torch.compile(lambda x: x + 1)(torch.zeros(8, device=device))
        return True
    except Exception as e:
        print(f"compile=False: torch.compile does not work here ({first_line(e):.120})", file=sys.stderr)
        return False


# -----------------------------------------------------------------------------
# processes and signals


def read_ranks():
    """Return (rank, local rank, world size) as torchrun sets them; (0, 0, 1) without torchrun."""
    if "RANK" not in os.environ:
        return 0, 0, 1
    with usage_errors("RANK is set, but LOCAL_RANK or WORLD_SIZE is not (use torchrun, or unset RANK)"):
        return tuple(int(os.environ[name]) for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"))


def join_processes(device, backend, timeout):
    """Initialize the process group of torchrun; timeout of collectives in seconds."""
    if backend == "auto":
        backend = "nccl" if device.startswith("cuda") and dist.is_nccl_available() else "gloo"
    timeout = datetime.timedelta(seconds=timeout)

    # torchrun keeps one store across restarts: restarted ranks must not find the old addresses in it
    env = os.environ.get
    one_node = env("GROUP_WORLD_SIZE") == "1"
    fresh_store = one_node or env("TORCH_DISABLE_SHARE_RDZV_TCP_STORE") == "1"
    if env("TORCHELASTIC_MAX_RESTARTS", "0") != "0" and not fresh_store:
        fail("--max-restarts on several nodes needs TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 before torchrun, on each")
    with usage_errors("cannot initialize the process group (set GLOO_SOCKET_IFNAME or NCCL_SOCKET_IFNAME)"):
        store, rank, world_size = next(dist.rendezvous("env://", timeout=timeout))
        if one_node:
            store = dist.PrefixStore(f"restart {env('TORCHELASTIC_RESTART_COUNT', '0')}", store)
        device_id = torch.device(device) if backend == "nccl" else None
        dist.init_process_group(
            backend, store=store, rank=rank, world_size=world_size, timeout=timeout, device_id=device_id
        )
    sys.excepthook = functools.partial(report_missing_ranks, store, rank, world_size)


def report_missing_ranks(store, rank, world_size, kind, error, trace):
    """Serve as sys.excepthook of a rank: if a collective failed, print which rank does not respond."""
    if issubclass(kind, dist.DistError) or re.search("gloo|nccl", str(error), re.IGNORECASE):
        with contextlib.suppress(RuntimeError):  # the store may be gone, too
            store.set(f"failed {rank}", "")
            time.sleep(3)  # ranks that respond fail at the same time
            missing = [str(r) for r in range(world_size) if not store.check([f"failed {r}"])]
            if missing:
                print(f"error: rank {', '.join(missing)} of {world_size} does not respond", file=sys.stderr)
                return
    report_error(kind, error, trace)


def sum_over_ranks(values, device):
    """Return the sums of a list of numbers over all ranks, which must all call it."""
    if not dist.is_initialized():
        return values
    tensor = torch.tensor(values, dtype=torch.float64, device=device)
    dist.all_reduce(tensor)
    return tensor.tolist()


def any_rank(flag, device):
    """Return whether the flag is set on any rank; all ranks must call it."""
    return sum_over_ranks([float(bool(flag))], device)[0] > 0


class StopSignal:
    """Note SIGINT, SIGTERM or SIGHUP, so that the step can be finished; a second one exits at once."""

    def __init__(self):
        self.received = 0  # number of the signal
        for name in ("SIGINT", "SIGTERM", "SIGHUP"):
            number = getattr(signal, name, None)  # Windows has no SIGHUP, and nohup ignores it
            if number and (name != "SIGHUP" or signal.getsignal(number) != signal.SIG_IGN):
                signal.signal(number, self.handle)

    def handle(self, number, frame):
        by_torchrun = "RANK" in os.environ  # it repeats signals, and kills after its --shutdown-timeout
        if self.received and not by_torchrun:
            os._exit(128 + number)
        if not self.received and os.environ.get("RANK", "0") == "0":
            again = "" if by_torchrun else "; again to exit at once"
            with contextlib.suppress(OSError):  # print() is not safe in a signal handler
                os.write(2, f"\nfinishing the step, then saving{again}\n".encode())
        self.received = self.received or number


def exit_now(code, distributed):
    """Flush and exit; ranks of torchrun skip Python's shutdown, in which gloo's threads sometimes abort."""
    try:
        sys.stdout.flush()
    except OSError:  # a closed pipe: Python would exit with a code of its own
        sys.stdout = None
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # all is saved
    if distributed:
        os._exit(code)
    sys.exit(code)
