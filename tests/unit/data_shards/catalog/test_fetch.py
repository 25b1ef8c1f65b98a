"""Fetching from a real server that drops, stalls, lies, changes its files and asks for patience."""

import contextlib
import datetime
import email.utils
import functools
import hashlib
import itertools
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from http_server import (
    Site,
    answers,
    drops_after,
    ignores_conditions,
    ignores_ranges,
    in_chunks,
    in_chunks_that_break_off,
    leaves_the_whole_unsaid,
    running,
    serve,
    stalls_after,
    without_length,
)
from original_layouts import zip_of

from data_shards.catalog import PublishedFile
from data_shards.catalog.fetch import FetchError, Patience, fetch, verify

BODY = np.random.default_rng(0).bytes(200_000)
OTHER = np.random.default_rng(1).bytes(200_000)


@pytest.fixture
def site():
    with running(Site(BODY, etag='"v1"')) as site:
        yield site


@pytest.fixture
def waits():
    return []


@pytest.fixture
def get(tmp_path, waits):
    """fetch() to a folder, waiting not at all, and noting for how long it would have."""

    def get(file, name="set.bin", timeout_s=5, **options):
        return fetch(file, tmp_path / name, patience=Patience(timeout_s=timeout_s, sleep=waits.append), **options)

    return get


def known(site, **fields):
    return PublishedFile(**{"url": site.url, "md5": site.md5, **fields})


def left(folder):
    return sorted(path.name for path in folder.iterdir())


def test_a_file_comes_whole_and_leaves_nothing_beside_it(site, get, tmp_path):
    steps = []
    verdict = get(known(site), progress=lambda done, total: steps.append((done, total)))
    assert (tmp_path / "set.bin").read_bytes() == BODY
    assert (verdict.checked, verdict.digest, verdict.state) == ("md5", site.md5, "fetched")
    assert left(tmp_path) == ["set.bin"]
    assert steps[-1] == (len(BODY), len(BODY))
    assert site.ranges == [""]


@pytest.mark.parametrize("reset", [False, True], ids=["closed", "reset"])
def test_a_dropped_connection_is_gone_on_with_at_the_byte(site, get, tmp_path, waits, reset):
    site.script += [drops_after(50_000, reset=reset), drops_after(70_000, reset=reset)]
    assert get(known(site)).state == "fetched"
    assert (tmp_path / "set.bin").read_bytes() == BODY
    assert len(waits) == 2
    if not reset:  # a reset may swallow bytes that were under way
        assert site.ranges == ["", "bytes=50000-", "bytes=120000-"]
        assert [headers.get("if-range") for headers in site.asked] == [None, '"v1"', '"v1"']


def test_a_connection_that_drops_often_but_moves_is_borne_with(site, get, tmp_path):
    site.script += [drops_after(10_000)] * 15
    get(known(site))
    assert (tmp_path / "set.bin").read_bytes() == BODY


def test_a_stalled_connection_is_given_up_and_its_part_kept(site, get, tmp_path, waits):
    site.script += [drops_after(10_000), *[drops_after(0)] * 9]
    with pytest.raises(FetchError, match=r"failed 6 times in a row.*closed early.*same command again later"):
        get(known(site))
    assert left(tmp_path) == ["set.bin.part", "set.bin.part.json"]
    assert (tmp_path / "set.bin.part").read_bytes() == BODY[:10_000]
    assert len(waits) == 6
    assert all(later > 0.9 * earlier for earlier, later in itertools.pairwise(waits[1:]))
    del site.script[:]
    get(known(site))
    assert site.ranges[-1] == "bytes=10000-"


def test_a_stalled_connection_is_left_and_gone_on_with(site, get, tmp_path):
    site.script.append(stalls_after(30_000))
    began, said = time.monotonic(), []
    get(known(site), timeout_s=0.3, say=said.append)
    assert time.monotonic() - began < 5
    assert (tmp_path / "set.bin").read_bytes() == BODY
    assert site.ranges == ["", "bytes=30000-"]
    assert said[0].startswith("no byte arrived in time at 30,000 bytes; again in")


def test_a_server_that_knows_no_ranges_sends_all_of_it_again(site, get, tmp_path):
    site.script += [drops_after(50_000), ignores_ranges]
    said = []
    get(known(site), say=said.append)
    assert (tmp_path / "set.bin").read_bytes() == BODY
    assert any("from the beginning" in line for line in said)


@pytest.mark.parametrize("second", [serve, ignores_conditions], ids=["If-Range is heeded", "If-Range is not heeded"])
def test_a_file_that_changes_between_two_attempts_is_never_mixed(site, get, tmp_path, second):
    def changes(handler):
        drops_after(50_000)(handler)
        site.body, site.etag = OTHER, '"v2"'

    site.script += [changes, second]
    get(PublishedFile(url=site.url))
    assert (tmp_path / "set.bin").read_bytes() == OTHER


def test_a_file_that_became_shorter_is_begun_anew(site, get, tmp_path):
    def shrinks(handler):
        drops_after(50_000)(handler)
        site.body, site.etag = OTHER[:1000], '"v2"'

    site.script += [shrinks, ignores_conditions]  # answers 416 to a range beyond its end
    get(PublishedFile(url=site.url))
    assert (tmp_path / "set.bin").read_bytes() == OTHER[:1000]


def test_without_validator_and_checksum_nothing_is_resumed(site, get, tmp_path):
    site.etag = 'W/"weak"'
    site.script.append(drops_after(50_000))
    get(PublishedFile(url=site.url))
    assert site.ranges == ["", ""]
    assert (tmp_path / "set.bin").read_bytes() == BODY


@pytest.mark.parametrize(
    ("etag", "date"), [("", "Fri, 06 Nov 2026 08:00:00 GMT"), ("", "")], ids=["date", "checksum alone"]
)
def test_a_date_or_a_known_checksum_is_enough_to_go_on(site, get, tmp_path, etag, date):
    site.etag, site.date = etag, date
    site.script.append(drops_after(50_000))
    get(known(site))
    assert site.ranges == ["", "bytes=50000-"]
    assert site.asked[1].get("if-range", "") == date
    assert (tmp_path / "set.bin").read_bytes() == BODY


def test_a_wrong_file_is_moved_away_and_the_right_one_can_follow(site, get, tmp_path):
    file, site.body = known(site), OTHER
    for _ in range(2):
        with pytest.raises(
            FetchError, match=r"its MD5 is [0-9a-f]{32}, but [0-9a-f]{32} was published.*quarantined as"
        ):
            get(file)
    assert left(tmp_path) == ["set.bin.wrong", "set.bin.wrong-2"]
    assert (tmp_path / "set.bin.wrong").read_bytes() == OTHER
    site.body = BODY
    assert get(file).state == "fetched"


def test_a_file_of_another_size_is_refused_before_it_comes(site, get, tmp_path):
    with pytest.raises(FetchError, match="offers 200,000 bytes, but 7 were published"):
        get(known(site, size_bytes=7))
    assert (tmp_path / "set.bin.part").stat().st_size == 0


def test_a_wrong_sha256_and_a_wrong_size_are_told(tmp_path):
    (tmp_path / "x").write_bytes(BODY)
    assert verify(PublishedFile(url="https://x/x", sha256="0" * 64), tmp_path / "x").fault.startswith("its SHA256 is")
    assert "200,000 bytes long" in verify(PublishedFile(url="https://x/x", size_bytes=1), tmp_path / "x").fault
    whole = verify(PublishedFile(url="https://x/x", sha256=hashlib.sha256(BODY).hexdigest()), tmp_path / "x")
    assert (whole.fault, whole.checked) == ("", "sha256")


def test_a_file_of_which_nothing_is_known_comes_with_its_md5(site, get):
    verdict = get(PublishedFile(url=site.url))
    assert (verdict.checked, verdict.digest) == ("nothing", site.md5)


def test_a_file_that_is_there_is_checked_and_not_fetched(site, get, tmp_path):
    (tmp_path / "set.bin").write_bytes(BODY)
    assert get(known(site)).state == "already there"
    (tmp_path / "set.bin").write_bytes(OTHER)
    with pytest.raises(FetchError, match="is there and is not the published file"):
        get(known(site))
    assert (tmp_path / "set.bin").read_bytes() == OTHER
    assert site.asked == []


def test_a_busy_server_is_waited_for_as_long_as_it_asks(site, get, waits):
    later = email.utils.format_datetime(datetime.datetime.now(datetime.UTC) + datetime.timedelta(seconds=90))
    site.script += [answers(503, Retry_After="7"), answers(429, Retry_After=later), answers(500), answers(502)]
    get(known(site))
    assert waits[0] == 7
    assert 80 < waits[1] <= 90
    assert 0 < waits[2] <= 4


def test_a_server_that_asks_for_more_than_a_person_waits_is_left(site, get):
    site.script.append(answers(429, Retry_After="3600"))
    with pytest.raises(FetchError, match="come back in 3600 s"):
        get(known(site))


@pytest.mark.parametrize("status", [401, 403, 404, 410])
def test_a_refusal_that_is_meant_is_not_repeated(site, get, status):
    site.script.append(answers(status))
    with pytest.raises(FetchError, match=f"refused with {status}.*by hand"):
        get(known(site))
    assert len(site.asked) == 1


def test_a_web_page_in_place_of_the_file_is_named(site, get, tmp_path):
    site.kind = "text/html; charset=utf-8"
    with pytest.raises(FetchError, match="is a web page, not the file"):
        get(known(site))


def test_a_body_that_is_coded_against_the_wish_is_refused(site, get):
    site.script.append(answers(200, Content_Encoding="gzip"))
    with pytest.raises(FetchError, match="sent with the encoding gzip"):
        get(known(site))
    assert site.asked[0]["accept-encoding"] == "identity"


@pytest.mark.parametrize("act", [without_length, in_chunks])
def test_a_body_of_unknown_length_comes_whole(site, get, tmp_path, act):
    site.script.append(act)
    totals = set()
    get(known(site), progress=lambda done, total: totals.add(total))
    assert (tmp_path / "set.bin").read_bytes() == BODY
    assert totals == {0}


def test_a_part_of_unknown_total_ends_where_first_announced(site, get, tmp_path):
    site.script += [drops_after(50_000), leaves_the_whole_unsaid(20_000)]
    get(PublishedFile(url=site.url))
    assert (tmp_path / "set.bin").read_bytes() == BODY
    assert site.ranges == ["", "bytes=50000-", "bytes=70000-"]


def test_chunks_that_break_off_are_gone_on_with(site, get, tmp_path):
    site.script.append(in_chunks_that_break_off)
    get(known(site))
    assert (tmp_path / "set.bin").read_bytes() == BODY
    assert site.ranges == ["", "bytes=10000-"]


def test_a_broken_body_without_length_is_detected(site, get, tmp_path):
    def breaks_off(handler):
        handler.head(200, None, Connection="close")
        handler.wfile.write(site.body[:500])
        handler.hang_up()

    site.script.append(breaks_off)
    with pytest.raises(FetchError, match="its MD5 is"):
        get(known(site))
    site.body = zip_of({"a/x.png": BODY})
    site.script.append(breaks_off)
    with pytest.raises(FetchError, match="not a complete zip archive"):
        get(PublishedFile(url=site.url), "set.zip")


def test_redirections_are_followed_with_their_range(site, get, tmp_path):
    with running(Site(BODY, etag='"v1"')) as store:
        site.script += [answers(302, Location=store.url), answers(302, Location=store.url)]
        store.script.append(drops_after(50_000))
        get(known(site))
        assert store.ranges == ["", "bytes=50000-"]
    assert (tmp_path / "set.bin").read_bytes() == BODY


def test_a_server_that_is_not_there_is_named(get, tmp_path):
    with running(Site(b"")) as gone:
        pass
    with pytest.raises(FetchError, match=r"failed 6 times in a row, at last with: 127\.0\.0\.1 cannot be reached"):
        get(PublishedFile(url=gone.url))


def test_the_proxy_of_the_environment_is_used(site, get, monkeypatch):
    with running(Site(BODY)) as proxy:
        monkeypatch.setenv("http_proxy", proxy.url.removesuffix("/files/set.bin"))
        monkeypatch.delenv("no_proxy", raising=False)
        get(PublishedFile(url="http://files.invalid/set.bin", md5=proxy.md5))
        assert proxy.paths == ["http://files.invalid/set.bin"]
        monkeypatch.setenv("no_proxy", "127.0.0.1")
        get(known(site), "direct.bin")
    assert site.paths == ["/files/set.bin"]


@pytest.fixture(scope="module")
def certificate(tmp_path_factory):
    """A certificate for 127.0.0.1 that nobody has signed but itself, with its key."""
    x509 = pytest.importorskip("cryptography.x509")
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "tests")])
    now = datetime.datetime.now(datetime.UTC)
    import ipaddress

    built = (
        x509.CertificateBuilder().subject_name(name).issuer_name(name).public_key(key.public_key())
        .serial_number(1).not_valid_before(now).not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]), False)
        .add_extension(x509.BasicConstraints(True, None), True)
        .sign(key, hashes.SHA256())
    )  # fmt: skip
    path = tmp_path_factory.mktemp("tls") / "server.pem"
    coding = serialization.Encoding.PEM
    secret = key.private_bytes(coding, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    path.write_bytes(built.public_bytes(coding) + secret)
    return str(path)


def test_an_untrusted_certificate_is_refused_with_the_remedy(get, certificate, monkeypatch, waits):
    with running(Site(BODY), certificate) as site:
        with pytest.raises(FetchError, match=r"certificate that is not trusted here.*SSL_CERT_FILE"):
            get(known(site))
        assert waits == []
        monkeypatch.setenv("SSL_CERT_FILE", certificate)
        assert get(known(site)).state == "fetched"


def test_a_redirection_away_from_https_is_refused(site, get, certificate, monkeypatch):
    monkeypatch.setenv("SSL_CERT_FILE", certificate)
    with running(Site(BODY), certificate) as secure:
        secure.script.append(answers(302, Location=site.url))
        with pytest.raises(FetchError, match="anybody on the way could change the file"):
            get(known(secure))
    assert site.asked == []


# --- disks and processes


def test_a_file_larger_than_the_free_disk_is_refused_first(site, get, tmp_path):
    def claims(handler):
        handler.head(200, 1 << 60)
        handler.hang_up()

    site.script.append(claims)
    with pytest.raises(FetchError, match=r"free, but 1,152,921,504,606,846,976 are needed: free some"):
        get(PublishedFile(url=site.url))


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 100 kB."""
    folder = tmp_path / "small"
    folder.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=100k", "tmpfs", folder], capture_output=True).returncode:
        pytest.skip("mounting a small file system is not allowed here")
    yield folder
    subprocess.run(["umount", folder], check=True)


def test_a_full_disk_keeps_the_part_and_the_fetch_resumes(site, small_disk, waits):
    (small_disk / "other").write_bytes(bytes(40_000))
    site.script.append(without_length)
    patience = Patience(sleep=waits.append)
    with pytest.raises(FetchError, match=r"No space left on device; free some space and give the same command"):
        fetch(known(site), small_disk / "set.bin", patience=patience)
    came = (small_disk / "set.bin.part").stat().st_size
    assert 0 < came < 100_000
    with pytest.raises(FetchError, match="are needed: free some"):
        fetch(known(site), small_disk / "set.bin", patience=patience)
    (small_disk / "other").unlink()
    subprocess.run(["mount", "-o", "remount,size=1m", small_disk], check=True)
    assert fetch(known(site), small_disk / "set.bin", patience=patience).state == "fetched"
    assert site.ranges[-1] == f"bytes={came}-"


def test_a_folder_that_is_a_file_is_named(site, tmp_path):
    (tmp_path / "folder").write_bytes(b"")
    with pytest.raises(FetchError, match=r"cannot write .*name a folder that you may write to with --to"):
        fetch(known(site), tmp_path / "folder" / "set.bin")


def in_another_process(site, target):
    code = (
        "import sys; from pathlib import Path; from data_shards.catalog import PublishedFile\n"
        "from data_shards.catalog.fetch import fetch\n"
        "print(fetch(PublishedFile(url=sys.argv[1], md5=sys.argv[2]), Path(sys.argv[3])).state)"
    )
    root = Path(__file__).resolve().parents[4]
    return subprocess.Popen(
        [sys.executable, "-c", code, site.url, site.md5, str(target)],
        env={**os.environ, "PYTHONPATH": str(root)}, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def wait_until(true, wait_s=20):
    deadline = time.monotonic() + wait_s
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def size_of(path):
    with contextlib.suppress(FileNotFoundError):
        return path.stat().st_size
    return -1


@pytest.mark.parametrize("came", [0, 60_000, 199_999])
def test_a_killed_fetch_is_gone_on_with_by_the_next(site, get, tmp_path, came):
    site.script.append(stalls_after(came))
    process = in_another_process(site, tmp_path / "set.bin")
    part = tmp_path / "set.bin.part"
    wait_until(lambda: size_of(part) == came and (part.with_name("set.bin.part.json")).exists())
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert get(known(site)).state == "fetched"
    assert site.ranges[1] == (f"bytes={came}-" if came else "")
    assert left(tmp_path) == ["set.bin"]


def test_a_fetch_killed_just_before_the_end_requests_no_more(site, get, tmp_path):
    (tmp_path / "set.bin.part").write_bytes(BODY)
    assert get(known(site, size_bytes=len(BODY))).state == "fetched"
    assert site.asked == []


@pytest.mark.parametrize("notes", ["", "{", "[]", '{"url": "elsewhere", "validator": "x"}'])
def test_a_part_of_unknown_origin_is_verified_or_fetched_again(site, get, tmp_path, notes):
    for file, wanted in ((known(site), "bytes=1000-"), (PublishedFile(url=site.url), "")):
        (tmp_path / "set.bin.part").write_bytes(BODY[:1000])
        (tmp_path / "set.bin.part.json").write_text(notes)
        get(file)
        assert site.ranges[-1] == wanted
        assert (tmp_path / "set.bin").read_bytes() == BODY
        (tmp_path / "set.bin").unlink()


def test_two_fetches_of_one_file_do_not_write_over_each_other(site, get, tmp_path):
    site.script.append(stalls_after(1000))
    process = in_another_process(site, tmp_path / "set.bin")
    try:
        wait_until(lambda: size_of(tmp_path / "set.bin.part") == 1000)
        with pytest.raises(FetchError, match="is being fetched by another process"):
            get(known(site))
        site.released.set()
        assert process.communicate(timeout=20)[0].strip() == "fetched"
    finally:
        process.kill()
        process.communicate()
    assert get(known(site)).state == "already there"


def test_two_dozen_random_faults_in_a_row_lose_no_byte(site, get, tmp_path):
    dice = np.random.default_rng(3)
    faults = [
        lambda: drops_after(int(dice.integers(0, 30_000))),
        lambda: drops_after(int(dice.integers(0, 30_000)), reset=True),
        lambda: stalls_after(int(dice.integers(1, 30_000))),
        lambda: answers(503),
        lambda: functools.partial(lambda handler: handler.hang_up()),
    ]
    site.script += [act for _ in range(8) for act in (faults[int(dice.integers(5))](), drops_after(5000), serve_less)]
    get(known(site), timeout_s=0.15)
    assert (tmp_path / "set.bin").read_bytes() == BODY


def serve_less(handler):
    handler.wfile.write(handler.part()[:3000])
    handler.hang_up()
