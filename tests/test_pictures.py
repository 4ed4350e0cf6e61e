"""Pictures below a folder."""

from __future__ import annotations

from fs_plugins.pictures import pictures_below


def test_pictures_below_a_folder_are_sorted_and_may_leave_out_what_is_hidden_or_no_file(tmp_path):
    for name in ("b/2.PNG", "b/1.jpeg", "a.jpg", "notes.txt", ".a.png", ".cache/3.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "dangling.png").symlink_to(tmp_path / "nothing.png")
    visible = [tmp_path / name for name in ("a.jpg", "b/1.jpeg", "b/2.PNG")]
    assert pictures_below(tmp_path, visible=True) == visible
    others = [tmp_path / name for name in (".a.png", ".cache/3.png", "folder.png", "dangling.png")]
    assert pictures_below(tmp_path) == sorted([*visible, *others])
    assert pictures_below(tmp_path / "b" / "none") == []
