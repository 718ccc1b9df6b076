"""``latentprior explore`` as a process: serves, stops cleanly, refuses what would open it to others."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import urllib.request

import pytest

from clocks import HANG_SECONDS
from latentprior.cli.main import main

pytest.importorskip("uvicorn")


@pytest.fixture(scope="module")
def prior(tmp_path_factory, learned):
    folder = tmp_path_factory.mktemp("prior") / "crescent"
    learned.save_pretrained(folder)
    return folder


def test_without_the_extra_its_name_is_said(prior, monkeypatch, capsys):
    monkeypatch.delitem(sys.modules, "latentprior.explorer.server", raising=False)
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    assert main(["explore", str(prior)]) == 2
    assert "pip install 'latentprior[explore]'" in capsys.readouterr().err


@pytest.mark.skipif(os.name != "posix", reason="signals of POSIX")
@pytest.mark.parametrize("number", [signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.slow)])
def test_serves_until_it_is_stopped(prior, number):
    command = [sys.executable, "-m", "latentprior", "explore", str(prior), "--port", "0", "--no-browser"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    ) as process:
        line = process.stdout.readline()
        url = re.match(r"http://127\.0\.0\.1:\d+/", line)
        assert url, line + process.stderr.read()
        assert "samples of the prior" in line
        with urllib.request.urlopen(f"{url[0]}api/info", timeout=HANG_SECONDS) as answer:
            assert json.load(answer)["name"] == "crescent"
        process.send_signal(number)
        assert process.wait(HANG_SECONDS) == 0
        assert process.stderr.read() == ""


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.0.1", "example.org", ""])
def test_other_machines_need_a_flag(prior, host, capsys):
    assert main(["explore", str(prior), "--host", host]) == 2
    assert "--allow-remote" in capsys.readouterr().err


def test_a_port_that_is_taken(prior, capsys):
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        assert main(["explore", str(prior), "--port", str(port), "--no-browser"]) == 1
    assert f"port {port}" in capsys.readouterr().err


def test_an_open_host_is_warned_of(prior, capsys):
    with socket.socket() as other:
        other.bind(("0.0.0.0", 0))
        other.listen()
        call = ["explore", str(prior), "--host", "0.0.0.0", "--allow-remote", "--no-browser"]
        assert main([*call, "--port", str(other.getsockname()[1])]) == 1
    assert capsys.readouterr().err.startswith("warning: the page on 0.0.0.0 has no password")


@pytest.mark.parametrize(
    "call", [["absent"], ["{prior}", "--calibration", "absent.npy"], ["{prior}", "--port", "70000"]]
)
def test_wrong_calls(prior, call, capsys):
    assert main(["explore", *(part.format(prior=prior) for part in call)]) == 2
    assert capsys.readouterr().err.startswith("error: ")
