"""Servers that are not trusted: silent and slow ones, and such that send elsewhere."""

import asyncio
import io
import time

import aiohttp
import pytest
from PIL import Image

from hf_vlm.data.io import files, remote, retries
from hf_vlm.data.io.decode import BadImageError, decode_image
from hf_vlm.data.io.messages import OutsideError, UnreachableError


@pytest.fixture(autouse=True)
def short_times(monkeypatch):
    """As in reality, but a hundredth of the time."""
    timeout = aiohttp.ClientTimeout(total=0.6, sock_connect=0.15, sock_read=0.15)
    monkeypatch.setattr(remote, "CLIENT_OPTIONS", {**remote.CLIENT_OPTIONS, "timeout": timeout})
    monkeypatch.setattr(retries, "READ_SECONDS", 1.2)


def test_a_silent_server_is_given_up_within_the_time_that_the_message_has(tmp_path, serve):
    (tmp_path / "0.tar").write_bytes(bytes(1024))
    with serve(tmp_path, lambda number: "silent") as (url, _):
        start = time.monotonic()
        with pytest.raises(UnreachableError, match=r"no answer, or a slow one, [3-7] times in (\d) s") as caught:
            files.open_binary(f"{url}/0.tar")
        elapsed = time.monotonic() - start
    assert 1.2 < elapsed < 4
    assert abs(int(str(caught.value).split(" times in ")[1].split()[0]) - elapsed) < 1


@pytest.mark.parametrize("failure", ["silent", "slow"])
def test_an_image_of_a_server_that_keeps_waiting_is_a_bad_one(tmp_path, serve, failure):
    Image.effect_noise((32, 32), 50).save(tmp_path / "a.png")  # a kilobyte: ten seconds where it drips
    with serve(tmp_path, lambda number: failure if number > 1 or failure == "silent" else None) as (url, _):
        start = time.monotonic()
        with pytest.raises(BadImageError, match=r"a\.png: the server gives no answer, or a slow one, 4 times in \d s"):
            decode_image(f"{url}/a.png")
        assert time.monotonic() - start < 4


def test_an_image_is_not_asked_for_when_its_time_is_over(tmp_path, serve, monkeypatch):
    monkeypatch.setattr(files, "REQUEST_BYTES", 64)
    monkeypatch.setattr(files, "BLOCK_SIZE", 64)
    (tmp_path / "a.bin").write_bytes(bytes(64 * 100))
    with serve(tmp_path, lambda number: None if number == 1 else time.sleep(0.05)) as (url, counts):
        with pytest.raises(UnreachableError, match="gives no answer, or a slow one, 1 times in 0 s"):
            files.read_bytes(f"{url}/a.bin", limit=10**6, seconds=0.3)
        assert counts["requests"] < 12


def test_a_redirect_to_a_private_server_is_refused(tmp_path, serve):
    Image.new("RGB", (4, 4), "red").save(tmp_path / "a.png")
    with (
        serve(tmp_path) as (private, counts),
        serve(tmp_path, lambda number: f"{private}/a.png?key=secret") as (url, _),
    ):
        with pytest.raises(BadImageError, match=rf"a\.png: {url}/a\.png redirects to {private}/a\.png, a") as caught:
            decode_image(f"{url}/a.png")
        assert "secret" not in str(caught.value)
        assert counts["all"] == 0


def test_a_redirect_to_a_private_server_is_refused_inside_archives_too(tmp_path, serve):
    with serve(tmp_path) as (private, counts), serve(tmp_path, lambda number: f"{private}/a.zip") as (url, _):
        with pytest.raises(BadImageError, match=rf"{url}/a\.zip redirects to {private}/a\.zip, a server on this"):
            decode_image(f"zip://a.png::{url}/a.zip")
        assert counts["all"] == 0


def test_a_redirect_of_a_server_to_itself_is_followed(tmp_path, serve):
    Image.new("RGB", (4, 4), "red").save(tmp_path / "a.png")
    own: list[str] = []
    with serve(tmp_path, lambda number: f"{own[0]}/a.png" if number % 2 else None) as (url, _):
        own.append(url)
        assert (decode_image(f"{url}/b.png")[0] == [255, 0, 0]).all()


def test_the_users_own_settings_win(monkeypatch):
    monkeypatch.setitem(remote.fsspec.config.conf, "https", {"client_kwargs": {"timeout": "mine", "trust_env": True}})
    assert remote.http_options("https://host/a")["client_kwargs"]["timeout"] == "mine"
    assert remote.http_options("https://host/a")["client_kwargs"]["trust_env"]
    assert remote.http_options("http://host/a")["client_kwargs"]["timeout"] != "mine"
    assert remote.http_options("s3://host/a") == remote.http_options("/a") == {}


def test_a_server_without_a_length_may_send_pieces_of_any_size(monkeypatch):
    content = bytes(range(100))

    class Pieces(io.BytesIO):
        def read(self, size=-1):
            return super().read(7 if size < 0 else min(size, 7))

    monkeypatch.setattr(files, "_open_remote", lambda *_: Pieces(content))
    assert files.read_bytes("http://host/a") == content
    with files.open_binary("http://host/a") as file:
        assert file.read(50) + file.read() == content
    with pytest.raises(ValueError, match="bytes are more than the 20 that one file may have"):
        files.read_bytes("http://host/a", limit=20)


def fetch(url, limit=10**6, seconds=5.0):
    return asyncio.run(remote.fetch_public(url, limit=limit, seconds=seconds))


def test_what_strangers_name_is_fetched_from_public_servers_alone(tmp_path, serve, monkeypatch):
    content = bytes(range(256)) * 1000
    (tmp_path / "a.png").write_bytes(content)
    with serve(tmp_path) as (url, counts):
        port = url.rpartition(":")[2]
        for host in ("127.0.0.1", "localhost", "[::1]", "[::ffff:127.0.0.1]", "0.0.0.0", "10.1.2.3"):
            with pytest.raises(OutsideError, match="on this machine or in its own network"):
                fetch(f"http://{host}:{port}/a.png")
        with pytest.raises((OSError, OutsideError)):  # 127.0.0.1 as one number, which aiohttp takes for no host
            fetch(f"http://2130706433:{port}/a.png")
        assert counts["all"] == 0
        monkeypatch.setattr(remote, "_is_global", lambda address: True)
        assert fetch(f"{url}/a.png") == content
        assert fetch(f"http://localhost:{port}/a.png") == content
        with pytest.raises(ValueError, match="more than the 1,000 bytes"):
            fetch(f"{url}/a.png", limit=1000)
        with pytest.raises(OSError, match="the server answers with the status 404"):
            fetch(f"{url}/b.png")
    for wrong in ("file:///etc/passwd", "a.png", "http://", "http://[::1", "ftp://a/b"):
        with pytest.raises(ValueError, match=r"URL|host|port"):
            fetch(wrong)


def test_what_strangers_name_may_not_redirect_to_private_servers(tmp_path, serve, monkeypatch):
    (tmp_path / "a.png").write_bytes(b"secret")
    with serve(tmp_path) as (private, counts), serve(tmp_path, lambda number: f"{private}/a.png") as (url, _):
        first = iter([True])  # the server that is named; the others are judged as they are
        is_global = remote._is_global
        monkeypatch.setattr(remote, "_is_global", lambda address: next(first, False) or is_global(address))
        with pytest.raises(OutsideError, match="redirects to"):
            fetch(f"{url}/a.png")
        assert counts["all"] == 0


@pytest.mark.parametrize("failure", ["silent", "slow"])
def test_what_strangers_name_has_its_time(tmp_path, serve, monkeypatch, failure):
    monkeypatch.setattr(remote, "_is_global", lambda address: True)
    (tmp_path / "a.png").write_bytes(bytes(1000))
    with serve(tmp_path, lambda number: failure) as (url, _):
        start = time.monotonic()
        with pytest.raises(TimeoutError):
            fetch(f"{url}/a.png", seconds=0.2)
        assert time.monotonic() - start < 3
