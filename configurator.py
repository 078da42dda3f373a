"""
What the settings are. A script's settings are its own globals; config files and flags override them, in order:

    python train.py config/train_shakespeare_char.py --batch_size=32 compile=False --device cpu --eval_only

Config files are Python and are run as such: they may import, compute and refer to earlier settings. Flags are literals.
Both are checked: an unknown name or a value of another type is an error that names the nearest setting.
"""

import ast
import contextlib
import ctypes
import difflib
import errno
import glob
import math
import os
import re
import signal
import sys
import tokenize

import torch


def fail(message):
    """Say in one line what is wrong and what to do, and exit with 2, the code for wrong usage."""
    print("error:", " ".join(str(message).split()), file=sys.stderr)
    sys.exit(2)


@contextlib.contextmanager
def usage_errors():
    """Turn what the model and the data have to say of wrong input (ValueError, OSError), and what PyTorch says of sizes
    that do not fit into memory (RuntimeError and others), into fail()'s one line."""
    try:
        yield
    except (ValueError, OSError, RuntimeError, MemoryError, OverflowError) as e:
        first_line = str(e).strip().split("\n")[0] or type(e).__name__
        fail(f"{e.strerror}: {e.filename}" if isinstance(e, OSError) and e.filename else first_line)


def last_words(kind, error, trace):
    """sys.excepthook of the scripts: Ctrl-C exits with 130, too little memory or disk with one line and 2. All else is
    a mistake in the code, and Python shows where."""
    if kind is KeyboardInterrupt:
        print(file=sys.stderr)
        sys.exit(130)
    if issubclass(kind, OSError) and error.errno == errno.ENOSPC:
        fail(error)
    if issubclass(kind, MemoryError) or re.search("out of memory|allocate", str(error).partition("\n")[0]):
        reason = ". ".join(str(error).split("\n")[0].split(". ")[:2])
        fail(f"out of memory ({reason}): lower --batch_size, --block_size, the model or, in sample.py, --num_samples")
    sys.__excepthook__(kind, error, trace)


# variables of the environment, and the settings whose defaults they change
ENVIRONMENT = {"WANDB_PROJECT": "wandb_project", "SAVE_INTERVAL": "save_interval", "MIXED_PRECISION": "dtype"}
PRECISIONS = {"true": "auto", "yes": "auto", "1": "auto", "false": "float32", "no": "float32", "0": "float32"}
PRECISIONS |= {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}


def from_environment(defaults):
    """{setting: value} of the ENVIRONMENT's variables that are set."""
    found = {}
    for variable, key in ENVIRONMENT.items():
        if key in defaults and (text := os.environ.get(variable, "").strip()):
            if key == "dtype" and text.lower() not in PRECISIONS:
                fail(f"MIXED_PRECISION takes {', '.join(PRECISIONS)}, not {text!r}")
            text = PRECISIONS[text.lower()] if key == "dtype" else text
            found[key] = check(key, parse(text, defaults[key]), defaults[key], variable)
    return found


def configure(script):
    """Override a script's settings, given as its globals(), from sys.argv. Returns all of them as a dict, and the set
    of the names that a file or a flag gave. Sets up how the script ends (last_words) and its standard streams.

    A setting is a global with a lower-case name, no leading underscore, and an int, float, bool or str as its value.
    """
    sys.excepthook = last_words
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:  # closed by whoever started the script
            setattr(sys, name, open(os.devnull, mode))
        if mode == "w" and hasattr(getattr(sys, name), "reconfigure"):
            getattr(sys, name).reconfigure(errors="replace")  # a character that cannot be shown is a "?"
    settings = {k: v for k, v in script.items() if k[0] != "_" and k.islower() and type(v) in (int, float, bool, str)}
    defaults, given, args = dict(settings), set(), sys.argv[1:]
    settings |= from_environment(defaults)
    if {"--help", "-h"} & set(args):
        print_help(script, settings)
        sys.exit(0)
    while args:
        arg = args.pop(0)
        if match := re.fullmatch(r"(?:--)?([A-Za-z][\w-]*)=(.*)", arg, re.DOTALL):
            key, text = match[1].replace("-", "_"), match[2]
        elif arg.startswith("-"):  # --key value, or --flag for a boolean
            key = arg.lstrip("-").replace("-", "_")
            if isinstance(defaults.get(key), bool) and not (args and args[0].lower() in ("true", "false")):
                text = "True"
            elif args and key in defaults and not args[0].startswith("--"):
                text = args.pop(0)
            else:
                fail(f"{arg} needs a value: {arg}=..." if key in defaults else unknown(key or arg, defaults))
        else:
            found = read_config(arg, {**script, **settings}, defaults)
            settings.update(found)
            given |= set(found)
            continue
        if key not in defaults:
            fail(unknown(key, defaults))
        settings[key] = check(key, parse(text, defaults[key]), defaults[key], f"--{key}")
        given.add(key)
    script.update(settings)
    changed = [f"{k}={v!r}" for k, v in settings.items() if k in given and v != defaults[k]]
    if changed and os.environ.get("RANK", "0") == "0":
        print("settings:", ", ".join(changed), file=sys.stderr)
    return settings, given


def parse(text, default):
    """A flag's text as a value: a Python literal where one is expected, else the text itself."""
    if isinstance(default, bool):
        return {"true": True, "1": True, "false": False, "0": False}.get(text.lower(), text)
    if isinstance(default, str) and text[:1] not in ("'", '"'):
        return text
    try:
        return ast.literal_eval(text)
    except (ValueError, TypeError, SyntaxError, RecursionError, MemoryError):
        return text


def check(key, value, default, where):
    """The value as the default's type, or fail(). An int serves as a float, and 1e4 as an int."""
    if type(default) is float and type(value) is int and abs(value) < 2**63:
        value = float(value)
    if type(default) is int and type(value) is float and value.is_integer():
        value = int(value)
    kind = {int: "a whole number", float: "a number", bool: "True or False", str: "text"}[type(default)]
    usable = abs(value) < 2**63 if type(value) is int else math.isfinite(value) if type(value) is float else True
    if type(value) is not type(default) or not usable:
        shown = repr(value)[:40] if type(value) is not int or usable else "one so large"
        fail(f"{where}: {key} takes {kind} such as {default!r}, not {shown}")
    return value


def unknown(key, known):
    near = difflib.get_close_matches(key, known, n=1)
    return f"unknown setting {key}" + (f"; did you mean {near[0]}?" if near else "; --help lists all")


def read_config(path, namespace, defaults):
    """Run a config file and return the settings that it assigns, checked.

    Settings of train.py that the running script lacks are passed over, so that one file serves every script. Other
    names are the file's own if it reads them itself or they start with an underscore; else they are mistakes.
    """
    try:
        with open(path, "rb") as f:
            source = f.read()
    except FileNotFoundError:
        near = difflib.get_close_matches(path, glob.glob("config/*.py"), n=1, cutoff=0.3)
        fail(f"no config file {path}" + (f"; did you mean {near[0]}?" if near else ""))
    except OSError as e:
        fail(f"config file {path}: {e.strerror}")
    try:
        tree = ast.parse(source, path)
        exec(compile(tree, path, "exec"), namespace)
    except KeyboardInterrupt:
        raise
    except BaseException as e:  # a config file can fail in any way that Python can
        fail(f"{path}: {type(e).__name__}: {e}")
    read = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load)}
    targets = [node.targets for node in ast.walk(tree) if isinstance(node, ast.Assign)]
    targets += [[node.target] for node in ast.walk(tree) if isinstance(node, ast.AugAssign | ast.AnnAssign)]
    names = {node.id for target in targets for part in target for node in ast.walk(part) if isinstance(node, ast.Name)}
    assigned = names & set(namespace)  # without the local variables of functions
    elsewhere = setting_lines(os.path.join(os.path.dirname(os.path.abspath(__file__)), "train.py"))
    found = {key: check(key, namespace[key], defaults[key], path) for key in sorted(assigned & set(defaults))}
    for key in sorted(assigned - set(defaults) - set(elsewhere)):
        if key.startswith("_"):
            continue
        if key not in read:
            fail(f"{path}: {unknown(key, defaults)}")
        if near := difflib.get_close_matches(key, defaults, n=1, cutoff=0.8):
            print(f"{path}: {key} is no setting ({near[0]} is), so it counts for this file alone", file=sys.stderr)
    return found


def setting_lines(path):
    """{name: (line number, default as written)} of the settings that stand at the top of a script."""
    with open(path, encoding="utf-8") as f:
        source = f.read()
    lines, written = {}, source.encode().split(b"\n")  # ast.get_source_segment would split it for each
    for node in ast.parse(source).body:
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Call):
            break  # the call of configure()
        if isinstance(node, ast.Assign):
            value = written[node.lineno - 1][node.value.col_offset : node.value.end_col_offset]
            lines[node.targets[0].id] = (node.lineno, value.decode())
    return lines


def end_with_the_pipe():
    """Let `script | head` end the script as it ends other programs, without a traceback."""
    if hasattr(signal, "SIGPIPE"):
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)


def print_help(script, settings):
    """The script's docstring, then each setting with its default and its comment, read from the source."""
    end_with_the_pipe()
    with open(script["__file__"], "rb") as f:
        comments = {t.start[0]: t.string.lstrip("# ") for t in tokenize.tokenize(f.readline) if t.string[:1] == "#"}
    lines = setting_lines(script["__file__"])
    print((script["__doc__"] or "").strip() + "\n\nsettings:")  # python -OO leaves it out
    first, last = min(n for n, _ in lines.values()), max(n for n, _ in lines.values())
    written = {number: f"  --{name}={default}" for name, (number, default) in lines.items()}
    for variable, key in ENVIRONMENT.items():
        if key in lines:
            number, value = lines[key][0], os.environ.get(variable, "").strip()
            written[number] = f"  --{key}={settings[key]!r}" if value else written[number]
            comments[number] = f"{comments.get(number, '')} [env: {variable}{'=' * bool(value)}{value}]"
    for number in range(first - 1, last + 1):
        if number in written:
            print(f"{written[number]:<42} {comments.get(number, '')}".rstrip())
        elif comments.get(number, "").strip("-"):
            print(f"\n{comments[number]}")


# -----------------------------------------------------------------------------
# device and dtype


def pick_device(device="auto", dtype="auto", tuned=True):
    """Resolve 'auto' to what this machine does best, and set PyTorch up for it; returns (device, dtype, what was
    chosen and why, in a line).

    device: cuda, cuda:1 ..., mps or cpu. dtype: float32, bfloat16 or float16, the type that matrix products are
    computed in. tuned=False leaves PyTorch as it comes, to measure what others do with it. Exits with one line for a
    device that is not here or a name that is none.
    """
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    kind = device.split(":")[0]
    if dtype not in ("auto", "float32", "bfloat16", "float16"):
        fail(f"dtype takes auto, float32, bfloat16 or float16, not {dtype!r}")
    if not re.fullmatch(r"cuda(:\d{1,4})?|(mps|cpu)(:0)?", device):
        fail(f"device takes auto, cuda, cuda:1, mps or cpu, not {device!r}")
    if kind == "cuda":
        if not torch.cuda.is_available():
            fail(f"no CUDA GPU is usable from this PyTorch ({torch.__version__}): try --device=auto")
        index = int(device.partition(":")[2] or 0)
        if index >= torch.cuda.device_count():
            fail(f"no {device} here: PyTorch sees {torch.cuda.device_count()} GPU(s), cuda:0 being the first")
        device = f"cuda:{index}"
        torch.cuda.set_device(device)
        torch.set_float32_matmul_precision("high")  # TF32
        native = torch.cuda.is_bf16_supported(including_emulation=False)
        best, why = ("bfloat16", "native") if native else ("float16", "no bfloat16 before Ampere; loss is scaled")
        name = torch.cuda.get_device_name(device)
    elif kind == "mps":
        if not torch.backends.mps.is_available():
            fail("no Apple GPU is usable from this PyTorch: try --device=auto")
        best, why, name = "float32", "half precision is unreliable on mps", "Apple GPU"
    else:
        native = cpu_multiplies_bfloat16()
        best, why = ("bfloat16", "AVX512-BF16 or AMX") if native else ("float32", "no fast bfloat16 on this CPU")
        name = f"{torch.get_num_threads()} threads"
        if tuned:
            keep_freed_memory()
        if dtype == "float16":
            dtype, best, why = "auto", "float32", "CPUs are slow in float16"
    if dtype == "auto":
        dtype = best
    else:
        why = "as asked"
    return device, dtype, f"device {device} ({name}), dtype {dtype} ({why})"


def cpu_multiplies_bfloat16():
    """Whether the CPU has instructions for bfloat16 products. Known on Linux, assumed absent elsewhere."""
    with contextlib.suppress(OSError), open("/proc/cpuinfo") as f:
        return bool({"avx512_bf16", "amx_bf16"} & set(re.search(r"^flags.*", f.read() + "\nflags", re.M)[0].split()))
    return False


def keep_freed_memory():
    """Make glibc keep the memory of freed tensors. By default it returns large blocks to the kernel, which must then
    clear them page by page when the next step asks for them again: up to a quarter of the time of a step."""
    if sys.platform == "linux":
        mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
        # M_MMAP_THRESHOLD is -3 and M_TRIM_THRESHOLD -1 in malloc.h; before glibc 2.35 the first was 32 MiB at most
        if mallopt and (mallopt(-3, 1 << 30) or mallopt(-3, 1 << 25)):
            mallopt(-1, 2**31 - 1)


def can_compile(device):
    """Try torch.compile on one addition; says in one line why not where it cannot work (no C++ compiler, Windows)."""
    try:
        torch.compile(lambda x: x + 1)(torch.zeros(8, device=device))
        return True
    except Exception as e:  # compilers fail in more ways than can be listed
        reason = f"{type(e).__name__}: {str(e).strip().splitlines()[0][:120]}"
        print(f"compile=False: torch.compile does not work here ({reason})", file=sys.stderr)
        return False
