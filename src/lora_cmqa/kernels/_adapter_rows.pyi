def add(
    y: int,
    x: int,
    segment: int,
    segments: int,
    outs: int,
    modules: int,
    inner: int,
    bits: int,
    small: int,
    threads: int,
    /,
) -> None: ...
def use(level: int, /) -> int: ...
