"""Downloads against a server on this machine: resumed, checked, and clear offline."""

import threading
import zipfile
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from eql_repro import fetch as module
from eql_repro.fetch import IMAGES, download, fetch, unpack

CONTENT = bytes(range(251)) * 40


class Handler(BaseHTTPRequestHandler):
    """Serves `server.files`; `server.mode` says how badly."""

    def do_GET(self):
        mode, content = self.server.mode, self.server.files.get(self.path)
        ranged = "Range" in self.headers
        start = int(self.headers.get("Range", "bytes=0-")[6:-1])
        self.server.asked.append(start)
        if content is None:
            return self.send_error(404)
        if start >= len(content):
            return self.send_error(416)
        if mode == "no ranges":
            ranged, start = False, 0
        start -= mode == "wrong start" and ranged
        self.send_response(206 if ranged else 200)
        if ranged and mode != "no header":
            rest = f"bytes {start}-{len(content) - 1}/{len(content)}"
            self.send_header("Content-Range", rest)
        if mode != "no length":
            self.send_header("Content-Length", str(len(content) - start))
        self.end_headers()
        self.wfile.write(content[start:][: self.server.most])

    def log_message(self, *_):
        pass


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.files, server.asked = {"/a.bin": CONTENT}, []
    server.mode, server.most = "", None
    server.url = f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def test_a_download_goes_on_where_it_stopped(server, tmp_path):
    (tmp_path / "a.bin.part").write_bytes(CONTENT[:3000])
    path = fetch(f"{server.url}/a.bin", tmp_path, size=len(CONTENT))
    assert path.read_bytes() == CONTENT and server.asked == [2999]
    assert [*tmp_path.iterdir()] == [path]  # no part is left
    assert fetch(f"{server.url}/a.bin", tmp_path) == path and server.asked == [2999]


def test_a_line_that_breaks_again_and_again(server, tmp_path):
    server.most = 3000
    assert fetch(f"{server.url}/a.bin", tmp_path).read_bytes() == CONTENT
    assert server.asked == [0, 2999, 5998, 8997]


def test_a_part_that_is_whole_already(server, tmp_path):
    (tmp_path / "a.bin.part").write_bytes(CONTENT)
    assert fetch(f"{server.url}/a.bin", tmp_path).read_bytes() == CONTENT
    assert server.asked == [len(CONTENT) - 1]


def test_a_part_longer_than_the_file_starts_anew(server, tmp_path):
    (tmp_path / "a.bin.part").write_bytes(bytes(2 * len(CONTENT)))
    assert fetch(f"{server.url}/a.bin", tmp_path).read_bytes() == CONTENT
    assert server.asked == [2 * len(CONTENT) - 1, 0]


@pytest.mark.parametrize("mode", ["no ranges", "no length"])
def test_servers_that_can_do_less(server, tmp_path, mode):
    server.mode = mode
    if mode == "no ranges":
        (tmp_path / "a.bin.part").write_bytes(b"x" * 3000)  # must not stay in front
    assert fetch(f"{server.url}/a.bin", tmp_path).read_bytes() == CONTENT


@pytest.mark.parametrize("mode", ["wrong start", "no header"])
def test_an_answer_that_begins_elsewhere_is_refused(server, tmp_path, mode):
    server.mode = mode
    (tmp_path / "a.bin.part").write_bytes(CONTENT[:3000])
    with pytest.raises(ConnectionError, match="cannot fetch"):
        fetch(f"{server.url}/a.bin", tmp_path)
    assert (tmp_path / "a.bin.part").read_bytes() == CONTENT[:3000]


def test_another_size_than_expected(server, tmp_path):
    with pytest.raises(ValueError, match="has 10,040 bytes, expected 10,041"):
        fetch(f"{server.url}/a.bin", tmp_path, size=10_041)
    assert not [*tmp_path.iterdir()]
    (tmp_path / "a.bin").write_bytes(b"old")
    with pytest.raises(ValueError, match="delete it and start again"):
        fetch(f"{server.url}/a.bin", tmp_path, size=10_040)


def test_errors_say_what_to_do(server, tmp_path):
    with pytest.raises(ConnectionError, match="404.*by hand as .*b.bin"):
        fetch(f"{server.url}/b.bin", tmp_path)
    server.most = 0  # answers, but brings nothing
    with pytest.raises(ConnectionError, match="ended at 0 of 10,040 bytes"):
        fetch(f"{server.url}/a.bin", tmp_path)
    with pytest.raises(ConnectionError, match="refused|reach"):
        fetch("http://127.0.0.1:9/a.bin", tmp_path, timeout=5)


def test_progress_is_shown_only_if_wanted(server, tmp_path, capsys):
    fetch(f"{server.url}/a.bin", tmp_path / "quiet")
    assert capsys.readouterr().err == ""
    fetch(f"{server.url}/a.bin", tmp_path / "loud", progress=True)
    assert "a.bin: 100%" in capsys.readouterr().err


# Archives


def archive(path, files):
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        for name, text in files.items():
            file.writestr(name, text)
    return path


def test_unpacking_does_what_is_left(tmp_path):
    path = archive(tmp_path / "a.zip", {"d/one": "first", "d/two": "second"})
    (tmp_path / "d").mkdir()
    (tmp_path / "d/one").write_text("FIRST")  # the same size: left alone
    (tmp_path / "d/two").write_text("sec")  # cut short: written again
    unpack(path, tmp_path)
    assert (tmp_path / "d/one").read_text() == "FIRST"
    assert (tmp_path / "d/two").read_text() == "second"


@pytest.mark.parametrize("keep", [slice(0, -1), slice(0, 60), slice(0, 0)])
def test_a_broken_archive_is_named(tmp_path, keep):
    path = archive(tmp_path / "a.zip", {"one": "first" * 50})
    path.write_bytes(path.read_bytes()[keep])
    with pytest.raises(ValueError, match="a.zip: not a whole zip file"):
        unpack(path, tmp_path)


def test_a_set_is_fetched_unpacked_and_then_left_alone(server, tmp_path, monkeypatch):
    monkeypatch.setitem(IMAGES, "val2017", 2)
    where = tmp_path / "server"
    where.mkdir()
    jpegs = {f"val2017/{i}.jpg": "x" for i in range(2)}
    both = {f"annotations/instances_{s}2017.json": s for s in ("train", "val")}
    for name, files in {"annotations_trainval2017": both, "val2017": jpegs}.items():
        path = archive(where / f"{name}.zip", files)
        server.files[f"/{path.name}"] = path.read_bytes()
    folder = tmp_path / "data"
    for _ in range(2):
        places = download(folder, "coco", ["val2017"], mirror=server.url)
        assert len(server.asked) == 2  # one archive holds both json files
    assert [p.name for p in places] == [
        "instances_train2017.json",
        "instances_val2017.json",
        "val2017",
    ]
    assert all(p.exists() for p in places) and not [*folder.glob("*.zip*")]
    (folder / "val2017/1.jpg").unlink()  # a folder that is not whole is fetched again
    download(folder, "coco", ["val2017"], mirror=server.url)
    assert len(server.asked) == 3 and (folder / "val2017/1.jpg").exists()


def test_coco_sizes_are_checked_without_a_mirror(server, tmp_path, monkeypatch):
    server.files["/val2017.zip"] = b"short"
    monkeypatch.setitem(module.SOURCES, "val2017", f"{server.url}/val2017.zip")
    monkeypatch.setattr(module, "_SETS", {"none": []})
    with pytest.raises(ValueError, match="5 bytes, expected 815,585,330"):
        download(tmp_path, "none", ["val2017"])


@pytest.mark.parametrize("options", [{"version": "v2"}, {"images": ["test2017"]}])
def test_unknown_parts_are_refused_before_anything_is_fetched(tmp_path, options):
    with pytest.raises(ValueError, match="must be one of"):
        download(tmp_path / "data", **options)
    assert not (tmp_path / "data").exists()
