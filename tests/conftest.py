"""Options of the whole suite. They stand here because pytest reads this file first, whichever part it is asked for."""


def pytest_addoption(parser):
    group = parser.getgroup("parity", "parity with the oracle on a checkpoint of your own")
    group.addoption("--checkpoint", metavar="DIR", help="a checkpoint that diffusers and kolors_ref can both load")
    group.addoption(
        "--dtype",
        default="float32",
        choices=["float64", "float32", "float16", "bfloat16"],
        help="the number format to compare in (default: float32)",
    )
    group.addoption("--device", default="cpu", help="where to compute (default: cpu)")
