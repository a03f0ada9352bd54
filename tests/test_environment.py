import shutil
import subprocess

import pytest

from formix.environment import _commit


@pytest.mark.skipif(shutil.which("git") is None, reason="git is not installed")
def test_the_commit_is_that_of_the_file_s_own_repository(tmp_path):
    def git(*arguments):
        named = ["-c", "user.name=someone", "-c", "user.email=someone@example.org"]
        done = subprocess.run(["git", "-C", tmp_path, *named, *arguments], check=True, capture_output=True, text=True)
        return done.stdout.strip()

    part, installed = tmp_path / "src" / "part.py", tmp_path / "venv" / "formix" / "environment.py"
    for file in (part, installed):
        file.parent.mkdir(parents=True)
        file.write_text("")
    assert _commit(part) is None
    git("init")
    git("add", "src")
    git("commit", "--message=one")
    assert _commit(part) == git("rev-parse", "--short=12", "HEAD")
    assert _commit(installed) is None
