from __future__ import annotations

import resource
import warnings

import pytest

from serving.errors import SettingsError

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # Ray's own
    from serving.router.deployment import check_open_files


@pytest.mark.parametrize("max_files", [18_850, 65_536, resource.RLIM_INFINITY])
def test_enough_open_files_for_haproxy(max_files: int) -> None:
    check_open_files(7500, max_files)


@pytest.mark.parametrize("max_files", [1024, 18_849])
def test_too_few_open_files_for_haproxy(max_files: int) -> None:
    with pytest.raises(SettingsError, match=rf"MAXCONN=7500 needs 18850 open files, and {max_files} are allowed"):
        check_open_files(7500, max_files)
