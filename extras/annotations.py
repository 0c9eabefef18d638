"""Annotation files of public datasets and labelling tools: one generator per format turns a file into rows.

parse_file() gives the rows of a file, each with a split. convert_dataset.py finds their videos and writes them.
"""

import csv
import io
import json
import math
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import parse_qs, quote, unquote, urlsplit

from script import UserError, counted, shown
from VLoader import as_list

SPLITS = ("train", "val", "test")
SPLIT_WORDS = {
    "train": "train",
    "training": "train",
    "val": "val",
    "valid": "val",
    "validate": "val",
    "validation": "val",
    "dev": "val",
    "test": "test",
    "testing": "test",
}


@dataclass(frozen=True)
class Row:
    """One line of an annotation file: a video and its labels."""

    video: str  # a path, or a file name without its suffix
    label: str | None = None
    captions: tuple[str, ...] = ()
    text: str | None = None
    split: str | None = None  # None: inferred from the file name
    frames: tuple[int, int] | None = None  # first and last image number, if the video is part of a frame folder
    times: tuple[float, float, float | None] | None = None  # start and end in seconds, fps; None: the whole video
    problem: str = ""  # why the row is refused
    unused: bool = False  # the list itself excludes the video from this split
    group: str | None = None  # the recording that the video comes from
    other_name: str = ""  # of the video, if `video` is not found
    may_overlap: bool = False  # a segment may have several labels: in this format segments overlap on purpose

    def __post_init__(self) -> None:
        # JSON may hold anything: a wrong type is caught here, where the file that holds it is still known
        texts = [text for text in (self.video, self.label, *self.captions, self.text, self.group) if text is not None]
        if not all(isinstance(text, str) for text in texts):
            raise TypeError("names, labels and captions must be strings")


# -- one generator per format -----------------------------------------------------------------------


def read_text(file: Path) -> str:
    """The file decoded as UTF-8, as UTF-16 if a byte order mark says so, else as cp1252 (VATEX's encoding).
    Raises UserError if it cannot be read."""
    try:
        data = file.read_bytes()
    except OSError as error:
        raise UserError(f"cannot read {file}: {error.strerror}") from None
    try:
        return data.decode("utf-16" if data[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig")
    except UnicodeDecodeError:
        return data.decode("cp1252", errors="replace")


def plain_text(file: Path) -> str:
    """The text of a file in a line-based format. Raises ValueError for a JSON file."""
    if file.suffix.lower() in (".json", ".jsonl"):
        raise ValueError("expected lines of text, not JSON")
    return read_text(file)


def lines_of(file: Path) -> Iterator[str]:
    """The non-empty lines. Only a line feed ends a line: captions may contain U+2028 and other separators."""
    return (line.strip() for line in plain_text(file).split("\n") if line.strip())


def cells_of(file: Path, separator: str = ",") -> list[list[str]]:
    """The non-empty rows of a csv file. Quoted cells may contain line breaks. Raises ValueError if it is malformed."""
    reader = csv.reader(io.StringIO(plain_text(file), newline=""), delimiter=separator, strict=True)
    try:
        return [[cell.strip() for cell in row] for row in reader if len(row) > 1 or "".join(row).strip()]
    except csv.Error as error:
        raise ValueError(f"line {reader.line_num}: {error}") from None


def table_of(cells: list[list[str]]) -> Iterator[dict[str, str]]:
    """The rows of a table as {column: cell}. The first row is the header; missing cells become "".
    Raises ValueError for two columns with the same title, and for a row with more cells than the header."""
    titles = cells[0] if cells else []
    if twice := [title for number, title in enumerate(titles) if title and title in titles[:number]]:
        raise ValueError(f"two columns are named {twice[0]}")
    for row in cells[1:]:
        if any(row[len(titles) :]):
            raise ValueError(
                f"a row has {len(row)} cells for {counted(len(titles), 'column')}: {shown(', '.join(row))}; "
                "put quotes around cells that contain commas"
            )
        yield dict(zip(titles, row + [""] * (len(titles) - len(row)), strict=False))


def split_fields(word: str) -> dict[str, str | None]:
    """The `split` and `problem` fields of a Row whose split column contains `word`."""
    split = split_of(word)
    return {"split": split, "problem": f"unknown split {word}" if word and split is None else ""}


PATH_TITLES = ("file_name", "filename", "path", "video_path", "videopath", "video", "file", "video_name", "clip")
PATH_TITLES += ("video_id", "name")
LABEL_TITLES = ("label", "class", "category", "class_name", "action", "target")
CAPTION_TITLES = ("caption", "sentence", "description")


def list_rows(file: Path) -> Iterator[Row]:
    """`path label`, separated by a tab, comma, semicolon or spaces; or a table with a header (path, label, caption,
    text, split, group, start, end)

    Other common column names work too: PATH_TITLES, LABEL_TITLES, CAPTION_TITLES.
    """
    # the first line decides on the separator
    first = next(lines_of(file), "")
    separator = next((mark for mark in "\t,;" if mark in first), None)
    cells = cells_of(file, separator) if separator else [split_at_path(line) for line in lines_of(file)]

    # a header is a first line that names a path column
    titles = [cell.lower() for cell in cells[0]] if cells else []
    if separator and any(title in PATH_TITLES for title in titles):
        yield from table_rows(table_of([titles, *cells[1:]]))
        return

    # without a header, exactly one label must follow the path: more than one is ambiguous, so never guess
    for row in cells:
        if len(row) == 2 and row[1]:
            yield Row(row[0], label=row[1])
        elif not any(row[1:]):
            yield Row(row[0], problem="no label")
        else:
            yield Row(row[0], problem=f"several labels ({', '.join(row[1:])}); lists of frames need --format frames")


def split_at_path(line: str) -> list[str]:
    """`a path.mp4 jumping jack` -> ["a path.mp4", "jumping jack"].

    Without a video suffix the path ends at the first space. Several numbers after the path stay separate cells,
    so that list_rows can report them as several labels."""
    from readers import FILE_SUFFIXES

    match = re.match(rf"(.*?(?:{'|'.join(map(re.escape, FILE_SUFFIXES))}))\s+(.*)", line, re.IGNORECASE)
    path, rest = match.groups() if match else [*line.split(maxsplit=1), ""][:2]
    numbers = rest.split()
    return [path, *numbers] if all(n.lstrip("-").isdigit() for n in numbers) else [path, rest]


def table_rows(rows: Iterator[dict[str, str]]) -> Iterator[Row]:
    """The rows of a table with a header. Columns have many names: the first known one that is filled wins."""

    def cell(row: dict[str, str], titles: tuple[str, ...]) -> str | None:
        return next((row[t] for t in titles if row.get(t)), None)

    for row in rows:
        caption = cell(row, CAPTION_TITLES)
        yield Row(
            cell(row, PATH_TITLES) or "",
            label=cell(row, LABEL_TITLES),
            captions=(caption,) if caption else (),
            text=cell(row, ("text",)),
            group=cell(row, ("group",)),
            **split_fields(cell(row, ("split", "subset")) or "") | times_fields(row),
        )


def times_fields(row: dict[str, str]) -> dict[str, Any]:
    """The `times` or `problem` field of a Row, from the columns start and end (in seconds) and fps."""
    start, end, fps = (row.get(key, "") for key in ("start", "end", "fps"))
    return segment_fields(start, end, fps or None) if start or end else {}


def segment_fields(start: Any, end: Any, fps: Any = None) -> dict[str, Any]:
    """The `times` or `problem` field of a Row with these seconds, which may be strings."""
    try:
        times = float(start), float(end), None if fps is None else float(fps)
    except (TypeError, ValueError):
        times = (0.0, 0.0, None)
    if 0 <= times[0] < times[1] < math.inf and (times[2] is None or 0 < times[2] < math.inf):
        return {"times": times}
    values = f"{start}, {end}" + ("" if fps is None else f", {fps}")
    return {"problem": f"start and end must be seconds with 0 <= start < end, and fps above 0, not {values}"}


def videofolder_rows(file: Path) -> Iterator[Row]:
    """metadata.csv or .parquet of Hugging Face's videofolder: file_name, and the columns of `list`

    The split is the folder train, validation or test that holds the video. `file_name` may be `*_file_name`, and `text`
    is the caption of a row without label and caption.
    """
    rows = parquet_rows(file) if file.suffix.lower() == ".parquet" else table_of(cells_of(file))
    for row in ({title.lower(): cell for title, cell in row.items()} for row in rows):
        title = next((t for t in row if t == "file_name" or t.endswith("_file_name")), None)
        if title is None:
            raise ValueError("no column file_name")
        folders = (file.absolute().parent.name, *PurePosixPath(row[title]).parts[:-1])
        split = next((f for f in folders if f.lower() in SPLIT_WORDS), "")
        path = (file.parent / row[title]).as_posix() if row[title] else ""
        row |= {"file_name": path, "split": row.get("split") or split}
        if not any(row.get(t) for t in LABEL_TITLES + CAPTION_TITLES):
            row |= {"caption": row.get("text", ""), "text": ""}
        yield from table_rows(iter([row]))


def parquet_rows(file: Path) -> Iterator[dict[str, str]]:
    """The rows of a parquet file as {column: cell}, as those of table_of(); a list of captions becomes as many rows.

    Raises UserError without pyarrow.
    """
    try:
        from pyarrow.parquet import read_table
    except ImportError:
        raise UserError(f"{file} needs pyarrow: pip install -r requirements-extra.txt") from None
    # an open file, because pyarrow takes some paths as addresses, and some folders as columns
    with file.open("rb") as stream:
        table = read_table(stream).to_pylist()
    for row in table:
        # an empty list leaves a row with an empty cell, to be counted and refused like one in a csv
        lists = {title: cell or [None] for title, cell in row.items() if isinstance(cell, list)}
        for number in range(max(map(len, lists.values()), default=1)):
            cells = row | {title: cell[number] for title, cell in lists.items()}
            yield {title: "" if cell is None else str(cell).strip() for title, cell in cells.items()}


def ucf101_rows(file: Path) -> Iterator[Row]:
    """`Class/v_Class_g01_c01.avi 1`; test lists have no number. The folder is the class, v_Class_g01 the recording"""
    for line in lines_of(file):
        name = re.sub(r"\s+\d+$", "", line)  # the class number of a training list
        recording = re.match(r"(.+_g\d+)_c\d+", PurePosixPath(name).name)
        yield Row(name, label=PurePosixPath(name).parent.name or None, group=recording[1] if recording else None)


def hmdb51_rows(file: Path) -> Iterator[Row]:
    """<class>_test_split<n>.txt with `video.avi 1`: 1 = train, 2 = test, 0 = not used in this split"""
    label, marker, _ = file.stem.partition("_test_split")
    if not marker:
        raise UserError(f"{file} is not an HMDB51 list: pass the <class>_test_split<n>.txt files of one split")
    for line in lines_of(file):
        name, number = line.rsplit(maxsplit=1)
        split = {"0": "train", "1": "train", "2": "test"}[number]
        yield Row(f"{label}/{name}", label=label, split=split, unused=number == "0")


def kinetics_rows(file: Path) -> Iterator[Row]:
    """csv with label, youtube_id, time_start, time_end, split; videos are named <id>_<start>_<end>, six digits each"""
    for row in table_of(cells_of(file)):
        start, end = (int(float(row[name])) for name in ("time_start", "time_end"))
        name = f"{row['youtube_id']}_{start:06d}_{end:06d}"
        yield Row(name, label=row.get("label") or None, **split_fields(row.get("split", "")))


def ssv2_rows(file: Path) -> Iterator[Row]:
    """[{"id", "label", "template"}]: the template without its brackets is the class, the label is the caption"""
    for row in json.loads(read_text(file)):
        if "template" not in row:
            yield Row(str(row["id"]), problem="no template (the published test list has none)")
            continue
        # "[Something] falling": the brackets mark what the label names, and are not part of the class
        label = row["template"].replace("[", "").replace("]", "")
        yield Row(str(row["id"]), label=label, captions=(row["label"],) if row.get("label") else ())


def msrvtt_rows(file: Path) -> Iterator[Row]:
    """videodatainfo.json: `videos` have the splits, `sentences` have the captions"""
    values = json.loads(read_text(file))
    captions: dict[str, list[str]] = {}
    for sentence in values["sentences"]:
        captions.setdefault(sentence["video_id"], []).append(sentence["caption"].strip())
    for video in values["videos"]:
        video_captions = tuple(filter(None, captions.pop(video["video_id"], [])))
        yield Row(video["video_id"], captions=video_captions, **split_fields(video["split"]))
    for name in captions:
        yield Row(name, problem="it has sentences but is missing from `videos`")


def msvd_rows(file: Path) -> Iterator[Row]:
    """`<id>_<start>_<end> caption` lines, # for comments; or the published csv, whose English captions are used

    Columns of the csv: VideoID, Start, End, Language, Description.
    """
    captions: dict[str, list[str]] = {}
    if file.suffix.lower() == ".csv":
        for row in table_of(cells_of(file)):
            video_captions = captions.setdefault(f"{row['VideoID']}_{row['Start']}_{row['End']}", [])
            video_captions += [row["Description"]] if row["Language"] == "English" else []
    else:
        for line in lines_of(file):
            name, _, caption = line.partition(" ")
            if not name.startswith("#"):
                captions.setdefault(name, []).append(caption.strip())
    for name, video_captions in captions.items():
        yield Row(name, captions=tuple(filter(None, video_captions)))


def vatex_rows(file: Path) -> Iterator[Row]:
    """`<id>|caption|caption ...`, or the published json ([{"videoID", "enCap"}])"""
    if file.suffix.lower() == ".json":
        rows = ((row["videoID"], row.get("enCap", [])) for row in json.loads(read_text(file)))
    else:
        rows = ((name, rest.split("|")) for name, _, rest in (line.partition("|") for line in lines_of(file)))
    for name, captions in rows:
        yield Row(name.strip(), captions=tuple(re.sub("[ \t]+", " ", c).strip() for c in captions if c.strip()))


def frames_rows(file: Path) -> Iterator[Row]:
    """`folder start end label`, where start and end are image numbers; or `folder count label`"""
    for line in lines_of(file):
        if match := re.fullmatch(r"(.+?)\s+(\d+)\s+(\d+)\s+(\S+)", line):
            folder, start, end, label = match.groups()
            yield Row(folder, label=label, frames=(int(start), int(end)))
        elif match := re.fullmatch(r"(.+?)\s+\d+\s+(\S+)", line):
            # the count is not needed: without start and end all images of the folder are used
            yield Row(match[1], label=match[2])
        else:
            yield Row(line, problem="expected `folder start end label` or `folder count label`")


def chat_rows(file: Path) -> Iterator[Row]:
    """[{"messages": [user, assistant], "videos": [path]}]: the question is the text, the answer is the caption"""
    for row in json.loads(read_text(file)):
        videos = row.get("videos", ())
        name = str(videos[0]) if videos else "(none)"
        # longer conversations have no single caption
        turns = [m for m in row["messages"] if m["role"] != "system"]
        if [m["role"] for m in turns] != ["user", "assistant"]:
            yield Row(name, problem="expected exactly one question and one answer")
        elif len(videos) != 1:
            yield Row(name, problem=f"{len(videos)} videos in one conversation")
        else:
            question, answer = (m["content"].replace("<video>", "").strip() for m in turns)
            yield Row(name, captions=(answer,), text=question or None, problem="" if answer else "no answer")


def activitynet_rows(file: Path) -> Iterator[Row]:
    """{"database": {id: {"subset", "annotations": [{"segment", "label"}]}}}; videos are named <id> or v_<id>"""
    for name, video in json.loads(read_text(file))["database"].items():
        fields = split_fields(video["subset"]) | {"other_name": f"v_{name}"}
        if not video.get("annotations"):
            yield Row(name, **fields | {"problem": "no segments (the published test set has none)"})
        for annotation in video.get("annotations", []):
            start, end = annotation["segment"]
            yield Row(name, label=annotation["label"], may_overlap=True, **fields | segment_fields(start, end))


def charades_rows(file: Path) -> Iterator[Row]:
    """csv with id and actions (`c092 11.90 21.20;...`); --class_names Charades_v1_classes.txt names the classes"""
    for row in table_of(cells_of(file)):
        actions = [action.split() for action in row["actions"].split(";") if action.strip()]
        if not actions:
            yield Row(row["id"], problem="no actions")
        for label, start, end in actions:
            yield Row(row["id"], label=label, may_overlap=True, **segment_fields(start, end))


# -- Label Studio -----------------------------------------------------------------------------------

RESULT_KEYS = {"timelinelabels", "labels", "choices", "text"}
SEVERAL_ANNOTATIONS = "annotations have segments; mark one of them as ground truth"
NO_FPS = "its times are frame numbers: add --fps, the frameRate of the <Video> tag (24 if the tag has none)"


def label_studio_rows(file: Path, fps: float | None = None) -> Iterator[Row]:
    """JSON or JSON_MIN export of Label Studio: TimelineLabels, Labels with times, Choices, TextArea (captions)

    Timeline labels have frame numbers; `fps`, or else the `fps` of each task, turns them into seconds. An annotation
    that is marked as ground truth replaces the others of its task.
    """
    # JSON_MIN has one item per annotation, with the fields of the task beside the labels
    tasks: dict[Any, tuple[dict[str, Any], list[dict[str, Any]]]] = {}
    for number, item in enumerate(json.loads(read_text(file))):
        task = tasks.setdefault(item.get("id", f"item {number}"), (item.get("data", item), []))
        task[1].extend(item.get("annotations", [item]))

    for data, annotations in tasks.values():
        video = task_video(data)
        kept = [a for a in annotations if not a.get("was_cancelled")]
        kept = [a for a in kept if a.get("ground_truth")] or kept
        rows = [r for a in kept for value in values_of(a) for r in value_rows(video, value, fps or data.get("fps"))]
        if not rows:
            yield Row(video, unused=bool(annotations) and not kept, problem="not annotated")
        elif len(kept) > 1 and any(row.times for row in rows):
            yield Row(video, problem=f"{len(kept)} {SEVERAL_ANNOTATIONS}")
        else:
            yield from rows


def task_video(data: dict[str, Any]) -> str:
    """The video of a task: the first of its fields that ends with the suffix of a video file; "" if there is none."""
    from readers import FILE_SUFFIXES

    names = [plain_name(value) for value in data.values() if isinstance(value, str)]
    return next((name for name in names if PurePosixPath(name).suffix.lower() in FILE_SUFFIXES), "")


def plain_name(value: str) -> str:
    """The path in a URL, or in the names that Label Studio gives to files: `/data/local-files/?d=clips/a.mp4` of its
    local storage, and `/data/upload/3/0f4b2c1d-a.mp4` of an upload, which gets 8 hexadecimal digits."""
    if not re.match(r"[\w+.-]+://|/data/", value):
        return value
    url = urlsplit(value)
    path = parse_qs(url.query).get("d", [unquote(url.path)])[0]
    return re.sub(r"^/data/upload/(\d+/)?[0-9a-f]{8}-", "", path)


def values_of(annotation: dict[str, Any]) -> list[dict[str, Any]]:
    """The `value` of each result of an annotation, or the same made of the fields of an item of JSON_MIN."""
    if "result" in annotation:
        values = [result.get("value", {}) for result in annotation["result"] or []]
    else:
        values = [v for items in annotation.values() for v in as_list(items) if isinstance(v, dict)]
        # a single choice is only its name there, and texts are only strings
        fields = [("choices", t) for t in ("choice", *LABEL_TITLES)] + [("text", t) for t in CAPTION_TITLES]
        named = [(key, [v for v in as_list(annotation.get(t)) if isinstance(v, str)]) for key, t in fields]
        values += [{key: texts} for key, texts in named if texts]
    return [value for value in values if not RESULT_KEYS.isdisjoint(value)]  # no relations, ratings, ...


def value_rows(video: str, value: dict[str, Any], fps: Any) -> Iterator[Row]:
    """A row for each label and each time range of a result's value."""
    if "sequence" in value:
        yield Row(video, problem="a box that follows an object; only labels, choices and texts are read")
        return
    if "ranges" in value:
        times = [frame_fields(r["start"], r["end"], fps) for r in value["ranges"]]
    else:
        times = [segment_fields(value["start"], value["end"])] if "start" in value else [{}]
    labels = [label for key in ("timelinelabels", "labels", "choices") for label in value.get(key, [])]
    texts = value.get("text", [])
    captions = (texts,) if isinstance(texts, str) else tuple(texts)
    for fields in times:
        for label in labels or [None]:
            yield Row(video, label=label, captions=captions, may_overlap="times" in fields, **fields)


def frame_fields(first: int, last: int, fps: Any) -> dict[str, Any]:
    """The `times` or `problem` field of a Row, from the numbers of its first and last frame, counted from 1."""
    return segment_fields((first - 1) / float(fps), last / float(fps)) if fps else {"problem": NO_FPS}


def label_studio_tasks(
    answers: list[dict[str, Any]], folder: Path, fps: float | None, tag: str
) -> list[dict[str, Any]]:
    """A task for each video, with its answers as a prediction, for import into Label Studio.

    Labels of whole videos become choices, labels of segments become timeline labels, captions become texts. Of answers
    with segments merged from windows, the windows are not used. Errors and answers to questions are left out.

    Args:
        answers: the rows that inference.py --output wrote.
        folder: the folder of the videos. Their addresses are those of local files, relative to its parent.
        fps: frame rate of the <Video> tag; needed for segments.
        tag: name of the tag that holds the labels.

    Raises UserError for a video outside of the folder, and for segments without fps.
    """
    folder = folder.resolve()
    merged = any("segment" in row for row in answers)
    results: dict[Path, list[dict[str, Any]]] = {}
    for row in answers:
        found = [] if merged and not row.get("segment") else results_of(row, fps)
        if not found:
            continue
        path = Path(row.get("path") or row["file"]).resolve()
        if not path.is_relative_to(folder):
            raise UserError(f"{path} is not in --videos {folder}")
        own = results.setdefault(path, [])
        for number, result in enumerate(found, start=len(own) + 1):
            own.append({"id": f"answer{number}", "from_name": tag, "to_name": "video", **result})

    tasks = []
    for path, own in results.items():
        address = f"/data/local-files/?d={quote(path.relative_to(folder.parent).as_posix())}"
        scores = [result["score"] for result in own if "score" in result]
        prediction = {"model_version": answers[0]["run"], "result": own}
        prediction |= {"score": sum(scores) / len(scores)} if scores else {}
        tasks.append({"data": {"video": address} | ({"fps": fps} if fps else {}), "predictions": [prediction]})
    return tasks


def results_of(row: dict[str, Any], fps: float | None) -> list[dict[str, Any]]:
    """The type, value and score of each of Label Studio's results for an answer. A segment or window has one for each
    label; an error, an answer without a label, and the answer to a question have none."""
    chosen = row.get("labels") or ([row] if row.get("label") else [])
    if chosen and "start" in row:
        if not fps:
            raise UserError("Label Studio counts frames, not seconds: add --fps, the frameRate of the <Video> tag")
        first = round(row["start"] * fps) + 1
        frames = {"start": first, "end": max(first, round(row["end"] * fps))}
        values = [{"ranges": [frames], "timelinelabels": [entry["label"]]} for entry in chosen]
        scores = [entry["score"] for entry in chosen]
        return [{"type": "timelinelabels", "value": v, "score": s} for v, s in zip(values, scores, strict=True)]
    if chosen:
        choices = [entry["label"] for entry in chosen]
        return [{"type": "choices", "value": {"choices": choices}, "score": min(entry["score"] for entry in chosen)}]
    if "caption" in row and "start" not in row:
        return [{"type": "textarea", "value": {"text": [row["caption"]]}}]
    return []


# to add a format, write a generator whose docstring starts with a paragraph of help, and list it here
FORMATS: dict[str, Callable[[Path], Iterator[Row]]] = {
    "list": list_rows,
    "videofolder": videofolder_rows,
    "ucf101": ucf101_rows,
    "hmdb51": hmdb51_rows,
    "kinetics": kinetics_rows,
    "ssv2": ssv2_rows,
    "msrvtt": msrvtt_rows,
    "msvd": msvd_rows,
    "vatex": vatex_rows,
    "frames": frames_rows,
    "chat": chat_rows,
    "activitynet": activitynet_rows,
    "charades": charades_rows,
    "label_studio": label_studio_rows,
}


def split_of(name: str) -> str | None:
    """The split named in a word or file name; None if there is none, or more than one."""
    # a whole word; the letter l may follow, as in UCF101's trainlist01.txt
    words = re.findall(r"(?<![a-z])(train(?:ing)?|val(?:id(?:ate|ation)?)?|dev|test(?:ing)?)(?![a-km-z])", name.lower())
    splits = {SPLIT_WORDS[word] for word in words}
    return splits.pop() if len(splits) == 1 else None


def read_class_names(file: Path) -> dict[str, str]:
    """{number: name} from `3 jumping` or `c003 jumping` lines, one name per line (numbered from 0), or json
    {"jumping": 3}.

    Raises ValueError for other json and for a number that is listed twice."""
    if file.suffix.lower() == ".json":
        values = json.loads(read_text(file))
        if not isinstance(values, dict) or not all(re.fullmatch(r"\d+", str(number)) for number in values.values()):
            raise ValueError('expected {"jumping": 3, ...}')
        pairs = [(str(number), name) for name, number in values.items()]
    else:
        lines = list(lines_of(file))
        numbered = [re.fullmatch(r"(\d+|c\d{3})[\s,]+(.+)", line) for line in lines]
        # a single line without a number means that digits are part of the names ("100 m sprint")
        all_numbered = lines and all(numbered)
        pairs = [m.groups() for m in numbered] if all_numbered else [(str(i), line) for i, line in enumerate(lines)]
    names = dict(pairs)
    if len(names) < len(pairs):  # two names for one number: either may be wrong
        raise ValueError("a class number is listed twice")
    return names


def label_problem(label: str | None) -> str:
    """The problem with a label that lists several classes (`3,17`, `a;b`, `a|b`, `[1, 2]`); else ""."""
    if label and re.fullmatch(r".*[|;].*|\[.*\]|\d+(?:[,\s]+\d+)+", label, re.DOTALL):
        return f"several labels ({label}) in one row; with --multi_label True, each label needs a row of its own"
    return ""


def parse_file(name: str, file: Path, default_split: str | None, fps: float | None = None) -> Iterator[Row]:
    """The rows of a file, each with a split; `fps` is that of label_studio_rows().

    Raises UserError if the file is not in this format.
    """
    split = default_split or split_of(file.stem) or "train"
    try:
        for row in label_studio_rows(file, fps) if name == "label_studio" else FORMATS[name](file):
            yield row if row.split else replace(row, split=split)
    except RecursionError:
        raise UserError(f"{file} is not in --format {name}: it is nested too deeply") from None
    except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError) as error:
        # whatever a parser trips over means that the file has another format; a KeyError is a missing field
        cause = f"no {error}" if isinstance(error, KeyError) else " ".join(str(error).split())
        raise UserError(f"{file} is not in --format {name}: {cause}") from None
