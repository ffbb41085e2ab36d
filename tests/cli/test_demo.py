def test_the_demo_ends_with_a_table_of_baseline_method_and_control_and_the_report(medrl, toy):
    answer = medrl("demo", "toy")
    assert answer.code == 0
    lines = [line.split() for line in answer.err.splitlines()]
    assert ["baseline", "uniform", "0.5000"] in lines
    assert ["method", "toy", "0.7500"] in lines
    assert ["control", "random", "0.2500"] in lines
    report = toy / "runs" / "demo_toy" / "report.html"
    assert report.is_file()
    assert f"report: {report}" in answer.err


def test_without_keep_only_the_report_is_left(medrl, toy, monkeypatch):
    import tempfile

    monkeypatch.setattr(tempfile, "tempdir", str(toy))
    medrl("demo", "toy")
    assert [path.name for path in toy.rglob("*") if path.is_file()] == ["report.html"]


def test_keep_names_a_new_folder(medrl, toy):
    answer = medrl("demo", "toy", "--keep", "kept")
    assert f"report: {toy / 'kept' / 'report.html'}" in answer.err
    again = medrl("demo", "toy", "--keep", "kept")
    assert (again.code, "not empty" in again.err) == (2, True)


def test_a_wrong_method_gives_the_nearest(medrl):
    answer = medrl("demo", "tooy")
    assert (answer.code, "did you mean 'toy'?" in answer.err) == (2, True)


def test_the_first_method_with_a_demo_is_taken(medrl, monkeypatch):
    from medrl.core.manager import PluginManager

    monkeypatch.setattr(PluginManager, "names", lambda _self: ["wreck", "toy"])
    assert "demo of toy" in medrl("demo").err
