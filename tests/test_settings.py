import ast
import dataclasses
import os
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
        (["--n_layers=3"], "unknown setting n_layers; did you mean n_layer?"),
        (["--whatever=3"], "unknown setting whatever; --help lists all"),
        (["--n_layer=three"], "takes a whole number such as 12, not 'three'"),
        (["--n_layer=2.5"], "takes a whole number such as 12, not 2.5"),
        (["--n_layer=True"], "takes a whole number such as 12, not True"),
        (["--compile=5"], "takes True or False such as True, not '5'"),
        (["--learning_rate=fast"], "takes a number such as 0.0006, not 'fast'"),
        (["--n_layer"], "--n_layer needs a value"),
        (["--n_layr"], "did you mean n_layer?"),
        (["--"], "unknown setting --"),
        (["--out_dir", "--compile"], "--out_dir needs a value"),
        (["--learning_rate=1e999"], "takes a number such as 0.0006, not inf"),
        (["--learning_rate=" + "9" * 400], "takes a number such as 0.0006, not one so large"),
        (["--n_layer=" + "9" * 20], "takes a whole number such as 12, not one so large"),
        (["--n_layer=" + "-" * 100_000], "takes a whole number such as 12, not '---"),
        (["config/train_shakespear_char_cpu.py"], "did you mean config/train_shakespeare_char_cpu.py?"),
    ],
)
def test_wrong_flags_are_one_line(settings, capsys, args, message):
    with pytest.raises(SystemExit) as e:
        settings(*args)
    err = capsys.readouterr().err
    assert e.value.code == 2 and message in err and err.count("\n") == 1


def test_config_files_compute_and_import_and_flags_win_by_order(settings, tmp_path):
    first, second = tmp_path / "first.py", tmp_path / "second.py"
    first.write_text(
        "import time\nfrom math import sqrt\ngpus = 8\n_note = 1\ndef double(x): return 2 * x\n"
        "batch_size = double(gpus)\nout_dir = 'ft-' + str(time.time())\nlearning_rate = 1\n"
        "n_layer = n_layer // 2\nversion = sys.version\nprint(version)\n"
    )
    second.write_text("n_layer = n_layer + 100\ncompile = False\n")
    result = settings(str(first), "--n_layer=7", str(second), "--compile=True")
    assert result["batch_size"] == 16 and result["out_dir"].startswith("ft-") and result["learning_rate"] == 1.0
    assert result["n_layer"] == 107 and result["compile"] is True


@pytest.mark.parametrize(
    "source, message",
    [
        ("n_layers = 3", "unknown setting n_layers; did you mean n_layer?"),
        ("n_layer = 'three'", "n_layer takes a whole number"),
        ("n_layer = 3.5", "n_layer takes a whole number"),
        ("learning_rate = float('nan')", "learning_rate takes a number"),
        ("n_layer = = 3", "SyntaxError"),
        ("n_layer = 1 / 0", "ZeroDivisionError"),
        ("import no_such_module", "no_such_module"),
        ("open('no_such_file')", "FileNotFoundError"),
        ("exit(0)", "SystemExit: 0"),
        ("n_layer = 10**400", "n_layer takes a whole number such as 12, not one so large"),
        ("def f(): f()\nf()", "RecursionError"),
    ],
)
def test_wrong_config_files_are_one_line(settings, capsys, tmp_path, source, message):
    path = tmp_path / "config.py"
    path.write_text(source)
    with pytest.raises(SystemExit) as e:
        settings(str(path))
    err = capsys.readouterr().err
    assert e.value.code == 2 and message in err and str(path) in err and err.count("\n") == 1


def test_a_config_file_may_begin_with_a_byte_order_mark(settings, tmp_path):
    (tmp_path / "config.py").write_bytes(b"\xef\xbb\xbfn_layer = 3\n")
    assert settings(str(tmp_path / "config.py"))["n_layer"] == 3


def test_a_near_miss_that_the_file_reads_itself_is_reported(settings, capsys, tmp_path):
    path = tmp_path / "config.py"
    path.write_text("max_iter = 5\nbatch_size = max_iter")
    assert settings(str(path))["max_iters"] == 100
    assert "max_iter is no setting (max_iters is)" in capsys.readouterr().err


def settings_of(name):
    return configurator.setting_lines(ROOT / name)


@pytest.mark.parametrize("name", SCRIPTS)
def test_help_lists_every_setting_with_its_comment(script, name):
    result = script(name, "--help")
    assert result.code == 0 and ast.get_docstring(ast.parse((ROOT / name).read_text())) in result.out
    for key, (_, default) in settings_of(name).items():
        assert f"  --{key}={default}" in result.out
    source = (ROOT / name).read_text().splitlines()
    for number, _ in settings_of(name).values():
        _, _, comment = source[number - 1].partition("  # ")
        line = next(
            line for line in result.out.splitlines() if line.startswith(f"  --{source[number - 1].split()[0]}=")
        )
        assert line.split(" [env: ")[0].endswith(comment)
    assert len([n for n, _ in settings_of(name).values() if "  # " in source[n - 1]]) > 10


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
    known = {name: eval(default) for name, (_, default) in settings_of("train.py").items()}
    assigned = runpy.run_path(str(ROOT / "config" / path), known)
    assert {k for k in assigned if not k.startswith("__")} <= set(known)


def test_device_and_dtype(capsys):
    assert configurator.pick_device("cpu", "float32")[:2] == ("cpu", "float32")
    best = "bfloat16" if configurator.cpu_multiplies_bfloat16() else "float32"
    assert configurator.pick_device("cpu", "auto")[1] == best
    assert configurator.pick_device("cpu", "float16")[1] == "float32"  # as nanoGPT does
    for device, dtype in (("tpu", "auto"), ("cpu", "int8"), ("cuda:99", "auto")):
        with pytest.raises(SystemExit):
            configurator.pick_device(device, dtype)
        assert capsys.readouterr().err.count("\n") == 1


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


def test_names_that_the_terminal_cannot_show():
    result = run_process("train.py", "--dataset=é", env={**os.environ, "PYTHONIOENCODING": "ascii:strict"})
    assert result.returncode == 2 and "no dataset in data/?" in result.stderr.replace(os.sep, "/")


@pytest.mark.parametrize(
    "error, message, code",
    [
        (KeyboardInterrupt(), "\n", 130),
        (OSError(28, "No space left on device"), "error: [Errno 28] No space left on device", 2),
        (MemoryError(), "error: out of memory (): lower --batch_size", 2),
        (RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has"), "Tried to allocate 2.00 GiB)", 2),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried"), "error: out of", 2),
    ],
)
def test_last_words(capsys, error, message, code):
    with pytest.raises(SystemExit) as e:
        configurator.last_words(type(error), error, None)
    err = capsys.readouterr().err
    assert e.value.code == code and message in err and err.count("\n") == 1


def test_mistakes_in_the_code_show_where_they_are(capsys):
    configurator.last_words(KeyError, KeyError("x"), None)
    assert "KeyError: 'x'" in capsys.readouterr().err
