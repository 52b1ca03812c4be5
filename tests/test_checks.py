"""Checks before any work that no other test covers."""

import pytest

from utils.checks import make_output_folder
from utils.errors import UserError


def test_the_output_folder_is_created_or_the_error_names_its_flag(tmp_path):
    make_output_folder(tmp_path / "a" / "b", "--output_dir")
    assert (tmp_path / "a" / "b").is_dir()
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="file can't be created: .*; see --figures"):
        make_output_folder(tmp_path / "file", "--figures")
