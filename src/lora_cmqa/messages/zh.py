"""中文文案，键为“房间.时刻”；en.py 的键与此相同。"""

TEXT: dict[str, str] = {}
