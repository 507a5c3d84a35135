from pathlib import Path

from deploy.serve.log_file import LogFile


def test_lines_are_on_disk_as_soon_as_they_are_written_and_a_second_run_appends(tmp_path: Path) -> None:
    path = tmp_path / "logs" / "worker-0.log"
    for text in ("first", "second"):
        log = LogFile(path)
        log.write(text)
        log.write("é")
        assert path.read_text().endswith(f"{text}\né\n")
        log.close()
    assert path.read_text() == "first\né\nsecond\né\n"


def test_at_its_size_it_starts_anew_and_keeps_one_older_file(tmp_path: Path) -> None:
    path = tmp_path / "worker-0.log"
    log = LogFile(path, most_bytes=10)
    for text in ("aaaa", "bbbb", "cccc", "dddd", "eeee"):
        log.write(text)
    log.close()
    assert path.read_text() == "eeee\n"
    assert (tmp_path / "worker-0.log.1").read_text() == "cccc\ndddd\n"


def test_a_log_that_cannot_be_written_stops_nobody(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    log = LogFile(tmp_path / "file" / "worker-0.log")
    log.write("lost")
    log.write("lost too")
    assert isinstance(log.failure, OSError)
