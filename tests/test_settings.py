import ast
import dataclasses
import os
import re
import runpy
import subprocess
import sys

import pytest
from conftest import ROOT

import configurator
from model import GPTConfig

SCRIPTS = ["train.py", "sample.py", "bench.py"]


@pytest.fixture
def settings(monkeypatch):
    """settings("--n_layer=3", ...) configures a little script and returns the settings."""

    def run(*args, **defaults):
        script = dict(
            n_layer=12, learning_rate=6e-4, compile=True, out_dir="out", max_iters=100, batch_size=4,
            __file__=str(ROOT / "train.py"), __doc__="A script.", sys=sys,
        )  # fmt: skip
        monkeypatch.setattr(sys, "argv", ["script.py", *args])
        result, given = configurator.configure(script)
        assert {k: script[k] for k in result} == result and given <= set(result)
        return result

    return run


@pytest.mark.parametrize(
    "args, expected",
    [
        (["--n_layer=3"], dict(n_layer=3)),
        (["n_layer=3"], dict(n_layer=3)),
        (["--n_layer", "3"], dict(n_layer=3)),
        (["--n-layer=3"], dict(n_layer=3)),
        (["--max_iters=1e4"], dict(max_iters=10000)),
        (["--learning_rate=1"], dict(learning_rate=1.0)),
        (["--learning_rate", "-1e-3"], dict(learning_rate=-1e-3)),
        (["--compile=False"], dict(compile=False)),
        (["--compile", "false"], dict(compile=False)),
        (["--compile", "0", "n_layer=3"], dict(compile=False, n_layer=3)),
        (["--compile"], dict(compile=True)),
        (["--compile", "n_layer=3"], dict(compile=True, n_layer=3)),
        (["--out_dir=a=b,c=d"], dict(out_dir="a=b,c=d")),
        (["--out_dir", "a=b"], dict(out_dir="a=b")),
        (["--out_dir=123"], dict(out_dir="123")),
        (["--out_dir='quoted'"], dict(out_dir="quoted")),
        (["--out_dir=a\nb"], dict(out_dir="a\nb")),
        (["--n_layer=3", "--n_layer=4"], dict(n_layer=4)),
    ],
)
def test_flags(settings, args, expected):
    assert {k: v for k, v in settings(*args).items() if k in expected} == expected
    assert all(type(v) is type(expected[k]) for k, v in settings(*args).items() if k in expected)


@pytest.mark.parametrize(
    "args, message",
    [
        (["--n_layers=3"], "unknown setting n_layers (did you mean n_layer?)"),
        (["--whatever=3"], "unknown setting whatever (--help lists all)"),
        (["--lr=1"], "did you mean learning_rate?"),
        (["--n_layer=three"], "must be an integer such as 12, got 'three'"),
        (["--n_layer=2.5"], "must be an integer such as 12, got 2.5"),
        (["--n_layer=True"], "must be an integer such as 12, got True"),
        (["--compile=5"], "must be True or False such as True, got '5'"),
        (["--learning_rate=fast"], "must be a number such as 0.0006, got 'fast'"),
        (["--n_layer"], "--n_layer needs a value"),
        (["--n_layr"], "did you mean n_layer?"),
        (["--"], "unknown setting --"),
        (["--out_dir", "--compile"], "--out_dir needs a value"),
        (["--learning_rate=1e999"], "must be a number such as 0.0006, got inf"),
        (["--learning_rate=" + "9" * 400], "learning_rate is too large"),
        (["--n_layer=" + "9" * 20], "n_layer is too large"),
        (["--n_layer=" + "-" * 100_000], "must be an integer such as 12, got '---"),
        (["Call me Ishmael"], 'a text is given as --start="..."'),
        (["config/train_shakespear_char_cpu.py"], "did you mean config/train_shakespeare_char_cpu.py?"),
    ],
)
def test_wrong_flag_is_one_line(settings, capsys, args, message):
    with pytest.raises(SystemExit) as e:
        settings(*args)
    err = capsys.readouterr().err
    assert e.value.code == 2 and message in err and err.count("\n") == 1


def test_config_files_compute_and_import_and_later_ones_win(settings, tmp_path):
    first, second = tmp_path / "first.py", tmp_path / "second.py"
    first.write_text(
        "import time\nfrom math import sqrt\ngpus = 8\n_note = 1\ndef double(x): return 2 * x\n"
        "batch_size = double(gpus)\nout_dir = 'ft-' + str(time.time())\nlearning_rate = 1\n"
        "n_layer = n_layer // 2\nversion = sys.version\nprint(version)\n"
    )
    second.write_text("n_layer = n_layer + 100\ncompile = 0\n")
    assert settings(str(second))["compile"] is False
    result = settings(str(first), "--n_layer=7", str(second), "--compile=True")
    assert result["batch_size"] == 16 and result["out_dir"].startswith("ft-") and result["learning_rate"] == 1.0
    assert result["n_layer"] == 107 and result["compile"] is True


@pytest.mark.parametrize(
    "source, message",
    [
        ("n_layers = 3", "unknown setting n_layers (did you mean n_layer?)"),
        ("n_layer = 'three'", "n_layer must be an integer"),
        ("n_layer = 3.5", "n_layer must be an integer"),
        ("learning_rate = float('nan')", "learning_rate must be a number"),
        ("n_layer = = 3", "SyntaxError"),
        ("n_layer = 1 / 0", "ZeroDivisionError"),
        ("import no_such_module", "no_such_module"),
        ("open('no_such_file')", "FileNotFoundError"),
        ("exit(0)", "SystemExit: 0"),
        ("n_layer = 10**400", "n_layer is too large"),
        ("def f(): f()\nf()", "RecursionError"),
    ],
)
def test_wrong_config_file_is_one_line(settings, capsys, tmp_path, source, message):
    path = tmp_path / "config.py"
    path.write_text(source)
    with pytest.raises(SystemExit) as e:
        settings(str(path))
    err = capsys.readouterr().err
    assert e.value.code == 2 and message in err and str(path) in err and err.count("\n") == 1


def test_config_file_with_byte_order_mark(settings, tmp_path):
    (tmp_path / "config.py").write_bytes(b"\xef\xbb\xbfn_layer = 3\n")
    assert settings(str(tmp_path / "config.py"))["n_layer"] == 3


def test_misspelled_setting_is_an_error_and_helper_variables_are_not(settings, capsys, tmp_path):
    path = tmp_path / "config.py"
    path.write_text("gpus = 8\n_max_iter = 5\nbatch_size = gpus * _max_iter")
    assert settings(str(path))["batch_size"] == 40
    path.write_text("max_iter = 5\nbatch_size = max_iter")
    with pytest.raises(SystemExit):
        settings(str(path))
    assert "unknown setting max_iter (did you mean max_iters?)" in capsys.readouterr().err


@pytest.mark.parametrize(
    "source",
    [
        "from base_config_of_test import *\nmax_iters = 3",
        "exec(open(r'{base}').read())\nmax_iters = 3",
        "def f():\n    global n_layer, batch_size\n    n_layer, batch_size = 5, 4\nf()\nmax_iters = 3",
    ],
)
def test_config_may_build_on_another_config(monkeypatch, tmp_path, source):
    base = tmp_path / "base_config_of_test.py"
    base.write_text("n_layer = 5\nbatch_size = 4\n")  # one changed, one assigned its default
    (tmp_path / "config.py").write_text(source.format(base=base))
    monkeypatch.syspath_prepend(tmp_path)
    script = dict(n_layer=12, max_iters=100, batch_size=4, __file__=str(ROOT / "train.py"), __doc__="A script.")
    monkeypatch.setattr(sys, "argv", ["script.py", str(tmp_path / "config.py")])
    result, explicit = configurator.configure(script)
    assert result == dict(n_layer=5, max_iters=3, batch_size=4)
    assert explicit == ({"n_layer", "max_iters"} if "global" in source else {"n_layer", "max_iters", "batch_size"})


def settings_of(name):
    return {key: default for key, default, *_ in configurator.setting_lines(ROOT / name) if key}


@pytest.mark.parametrize("name", SCRIPTS)
def test_help_lists_every_setting_with_its_comment(script, name):
    result = script(name, "--help")
    assert result.code == 0 and ast.get_docstring(ast.parse((ROOT / name).read_text())) in result.out
    for key, default in settings_of(name).items():
        assert f"  --{key}={default}" in result.out
    for path in (ROOT / "config").glob("*.py"):
        title = path.read_text().partition("\n")[0].strip("# :")
        assert re.search(rf"  config/{path.name} +{re.escape(title)}\n", result.out) and len(title) < 120
    source = (ROOT / name).read_text()
    for key, default in settings_of(name).items():
        _, _, comment = re.search(rf"^{key} = .*", source, re.MULTILINE)[0].partition("  # ")
        line = next(line for line in result.out.splitlines() if line.startswith(f"  --{key}={default}"))
        assert line.split(" [env: ")[0].endswith(comment)
    assert len(re.findall(r"^  --\w+=.* {2}\w", result.out, re.MULTILINE)) > 10


@pytest.mark.parametrize("name", SCRIPTS)
def test_every_setting_is_read(name):
    tree = ast.parse((ROOT / name).read_text())
    read = {n.id for n in ast.walk(tree) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Load)}
    handed_over = {field.name for field in dataclasses.fields(GPTConfig)} | {
        "gradient_checkpointing",
        "muon",
    }  # to a GPT
    handed_over |= {"lora_rank", "lora_targets"} if name == "bench.py" else set()
    assert set(settings_of(name)) - read <= handed_over


@pytest.mark.parametrize("path", sorted(p.name for p in (ROOT / "config").glob("*.py")))
def test_presets_set_only_settings_of_train(path):
    known = {name: eval(default) for name, default in settings_of("train.py").items()}
    assigned = runpy.run_path(str(ROOT / "config" / path), known | {"given": {}})
    assert {k for k, v in assigned.items() if k[0] != "_" and type(v) in (int, float, bool, str)} <= set(known)


def test_device_and_dtype(capsys):
    assert configurator.pick_device("cpu", "float32")[:2] == ("cpu", "float32")
    best = "bfloat16" if configurator.has_fast_bfloat16() else "float32"
    assert configurator.pick_device("cpu", "auto")[1] == best
    assert configurator.pick_device("cpu", "float16")[1] == "float32"  # as nanoGPT does
    for device, dtype in (("tpu", "auto"), ("cpu", "int8"), ("cuda:99", "auto")):
        with pytest.raises(SystemExit):
            configurator.pick_device(device, dtype)
        assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.parametrize(
    "name, given, spin_count",
    [
        ("train.py", {}, "5000"),
        ("train.py", {"GOMP_SPINCOUNT": "7"}, "7"),
        ("train.py", {"OMP_WAIT_POLICY": "active"}, None),
        ("sample.py", {}, "20000"),
        ("bench.py", {}, None),
    ],
)
def test_spin_count_is_set_unless_the_user_has_set_it(monkeypatch, name, given, spin_count):
    monkeypatch.setattr(sys, "argv", [f"folder/{name}"])
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)  # which the module replaces
    environment = {k: v for k, v in os.environ.items() if k not in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")}
    monkeypatch.setattr(os, "environ", environment | given)
    exec((ROOT / "configurator.py").read_text(), {"__name__": "configurator"})
    assert os.environ.get("GOMP_SPINCOUNT") == spin_count


def run_process(*args, **options):
    return subprocess.run([sys.executable, *args], cwd=ROOT, stderr=subprocess.PIPE, text=True, **options)


@pytest.mark.skipif(os.name != "posix", reason="needs POSIX file descriptors")
def test_scripts_start_without_standard_streams():
    for args in (["--help"], ["--out_dir=nowhere"]):
        result = run_process("sample.py", *args, preexec_fn=lambda: (os.close(0), os.close(1)))
        assert result.returncode == (0 if args == ["--help"] else 2) and "Traceback" not in result.stderr


@pytest.mark.skipif(os.name != "posix", reason="needs pipes that signal")
@pytest.mark.parametrize("name", SCRIPTS)
def test_help_into_a_closed_pipe_is_quiet(name):
    reading, writing = os.pipe()
    os.close(reading)
    assert run_process(name, "--help", stdout=writing).stderr == ""
    os.close(writing)


def test_message_the_terminal_cannot_encode():
    result = run_process("train.py", "--dataset=é", env={**os.environ, "PYTHONIOENCODING": "ascii:strict"})
    assert result.returncode == 2 and "no dataset in data/?" in result.stderr.replace(os.sep, "/")


@pytest.mark.parametrize(
    "error, message, code",
    [
        (KeyboardInterrupt(), "\n", 130),
        (OSError(28, "No space left on device"), "error: [Errno 28] No space left on device", 2),
        (MemoryError(), "error: out of memory (MemoryError): lower --batch_size", 2),
        (RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has"), "Tried to allocate 2.00 GiB)", 2),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried"), "error: out of", 2),
    ],
)
def test_report_error_is_one_line_for_users(capsys, error, message, code):
    with pytest.raises(SystemExit) as e:
        configurator.report_error(type(error), error, None)
    err = capsys.readouterr().err
    assert e.value.code == code and message in err and err.count("\n") == 1


def test_names_and_texts_cannot_control_the_terminal(capsys):
    with pytest.raises(SystemExit), configurator.usage_errors():
        raise ValueError("cannot read a\x1b[2J\x9b")
    configurator.print0("a\x07\tb\x1b[2J")
    out, err = capsys.readouterr()
    assert err == "error: cannot read a\ufffd[2J\ufffd\n" and out == "a\ufffd\tb\ufffd[2J\n"


def test_bugs_show_a_traceback(capsys):
    configurator.report_error(KeyError, KeyError("x"), None)
    assert "KeyError: 'x'" in capsys.readouterr().err


def readme_commands():
    """The commands of README.md and config/slurm.sh that start a script here, as lists of words."""
    text = (ROOT / "README.md").read_text() + "```sh\n" + (ROOT / "config/slurm.sh").read_text() + "```\n"
    text = text.replace("\\\n", " ").replace("&&", "")
    lines = [line for block in re.findall(r"^```sh\n(.*?)^```", text, re.S | re.M) for line in block.splitlines()]
    lines += re.findall(r"`((?:python|torchrun) [^`]+)`", text)
    words = [line.split(" #")[0].split() for line in lines]
    return [line for line in words if {"python", "torchrun"} & set(line) and any(w.endswith(".py") for w in line)]


def test_commands_of_the_readme_name_existing_scripts_configs_and_settings():
    from data.preparation import OPTIONS

    assert len(readme_commands()) > 20
    for words in readme_commands():
        at = next(i for i, word in enumerate(words) if word.endswith(".py"))
        name, args = words[at], words[at + 1 :]
        assert (ROOT / name).exists(), name
        known = {"help", *(settings_of(name) if name in SCRIPTS else OPTIONS)}
        for arg in args:
            if arg.startswith("config/"):
                assert (ROOT / arg).exists(), arg
            if arg.startswith("--"):
                assert arg[2:].partition("=")[0] in known, f"{name} {arg}"
