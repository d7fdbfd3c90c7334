"""Know what BabyLM 2026 asks of a submission: files, sizes, checkpoints, leaderboard.

    from babyllama.submission.official import ZERO_SHOT, checkpoint_names
    ZERO_SHOT["blimp"].full  # "blimp_filtered"
    checkpoint_names("strict-small")  # ["chck_1M", "chck_2M", ..., "chck_100M"]

The facts are those of the folder strict/ of github.com/babylm-org/babylm-eval at 3d57ddc (July
2026). This module measures nothing and opens no files.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from babyllama.evaluation.tasks import TASKS
from babyllama.runs.checkpoints import checkpoint_words, milestone_name

Sizes = dict[str, int]  # the number of predictions of each subset

_BLIMP = """
adjunct_island:928 anaphor_gender_agreement:971 anaphor_number_agreement:931
animate_subject_passive:895 animate_subject_trans:923 causative:818
complex_np_island:846 coordinate_structure_constraint_complex_left_branch:906
coordinate_structure_constraint_object_extraction:949 determiner_noun_agreement_1:929
determiner_noun_agreement_2:931 determiner_noun_agreement_irregular_1:681
determiner_noun_agreement_irregular_2:820 determiner_noun_agreement_with_adj_2:941
determiner_noun_agreement_with_adj_irregular_1:718
determiner_noun_agreement_with_adj_irregular_2:840
determiner_noun_agreement_with_adjective_1:933 distractor_agreement_relational_noun:788
distractor_agreement_relative_clause:871 drop_argument:920 ellipsis_n_bar_1:802
ellipsis_n_bar_2:828 existential_there_object_raising:812
existential_there_quantifiers_1:930 existential_there_quantifiers_2:911
existential_there_subject_raising:924 expletive_it_object_raising:759 inchoative:855
intransitive:868 irregular_past_participle_adjectives:961
irregular_past_participle_verbs:942 irregular_plural_subject_verb_agreement_1:804
irregular_plural_subject_verb_agreement_2:892 left_branch_island_echo_question:947
left_branch_island_simple_question:951 matrix_question_npi_licensor_present:929
npi_present_1:909 npi_present_2:914 only_npi_licensor_present:882 only_npi_scope:837
passive_1:840 passive_2:903 principle_a_c_command:946 principle_a_case_1:912
principle_a_case_2:915 principle_a_domain_1:914 principle_a_domain_2:915
principle_a_domain_3:941 principle_a_reconstruction:967
regular_plural_subject_verb_agreement_1:890 regular_plural_subject_verb_agreement_2:945
sentential_negation_npi_licensor_present:919 sentential_negation_npi_scope:871
sentential_subject_island:961 superlative_quantifiers_1:979 superlative_quantifiers_2:986
tough_vs_raising_1:948 tough_vs_raising_2:920 transitive:868 wh_island:960
wh_questions_object_gap:859 wh_questions_subject_gap:898
wh_questions_subject_gap_long_distance:857 wh_vs_that_no_gap:861
wh_vs_that_no_gap_long_distance:875 wh_vs_that_with_gap:919
wh_vs_that_with_gap_long_distance:910
"""
_BLIMP_SIZES = {name: int(size) for name, size in (pair.split(":") for pair in _BLIMP.split())}
_SUPPLEMENT_SIZES = {
    "hypernym": 842,
    "qa_congruence_easy": 64,
    "qa_congruence_tricky": 165,
    "subject_aux_inversion": 3867,
    "turn_taking": 280,
}
_EWOK_SIZES = {
    "agent-properties": 2210,
    "material-dynamics": 770,
    "material-properties": 170,
    "physical-dynamics": 120,
    "physical-interactions": 556,
    "physical-relations": 818,
    "quantitative-properties": 314,
    "social-interactions": 294,
    "social-properties": 328,
    "social-relations": 1548,
    "spatial-relations": 490,
}
_ENTITIES = {  # items with 0 to 5 operations
    "regular": (517, 409, 405, 425, 388, 94),
    "ambiref": (508, 428, 413, 409, 434, 123),
    "move_contents": (516, 437, 399, 406, 353, 116),
}
_ENTITY_SIZES = {
    f"{split}_{operations}_ops": size
    for split, sizes in _ENTITIES.items()
    for operations, size in enumerate(sizes)
}
_COMPS_SIZES = {"base": 49340} | dict.fromkeys(
    ("wugs", "wugs_dist_before", "wugs_dist_in_between"), 13896
)


@dataclass(frozen=True)
class OfficialTask:
    """A zero-shot task of BabyLM: where its data is, and how large its predictions are."""

    key: str  # in the collated file
    full: str  # below full_eval
    sizes: Sizes  # of the full data; empty if every item has its own key
    fast: str | None = None  # below fast_eval
    fast_sizes: Sizes | None = None
    n_items: int | None = None  # if every item has its own key


ZERO_SHOT = {  # by the name in babyllama.evaluation.tasks.TASKS
    "blimp": OfficialTask(
        "blimp", "blimp_filtered", _BLIMP_SIZES, "blimp_fast", dict.fromkeys(_BLIMP_SIZES, 200)
    ),
    "supplement": OfficialTask(
        "blimp_supplement",
        "supplement_filtered",
        _SUPPLEMENT_SIZES,
        "supplement_fast",
        dict.fromkeys(_SUPPLEMENT_SIZES, 50),
    ),
    "ewok": OfficialTask(
        "ewok", "ewok_filtered", _EWOK_SIZES, "ewok_fast", dict.fromkeys(_EWOK_SIZES, 100)
    ),
    "entity_tracking": OfficialTask(
        "entity_tracking_filtered",
        "entity_tracking",
        _ENTITY_SIZES,
        "entity_tracking_fast",
        {name: size for name, size in _ENTITY_SIZES.items() if name.startswith("regular")},
    ),
    "comps": OfficialTask("comps", "comps", _COMPS_SIZES),
    "global_piqa_parallel": OfficialTask(
        "global_piqa_parallel", "global_piqa_parallel", {}, "global_piqa_parallel", {}, n_items=103
    ),
    "global_piqa_nonparallel": OfficialTask(
        "global_piqa_nonparallel",
        "global_piqa_nonparallel",
        {},
        "global_piqa_nonparallel",
        {},
        n_items=100,
    ),
    "reading": OfficialTask(
        "reading",
        "reading/reading_data.csv",
        {"reading": 1726},
        "reading/reading_data.csv",
        {"reading": 1726},
    ),
}
GLUE_DATA = "glue_filtered"  # below full_eval: TASK.train.jsonl and TASK.valid.jsonl
GLUE_SIZES = {
    "boolq": 1635,
    "mnli": 4908,
    "mrpc": 204,
    "multirc": 2424,
    "qqp": 20215,
    "rte": 139,
    "wsc": 52,
}
AOA_CONTEXTS = "aoa/cdi_childes.json"  # below full_eval
AOA_AGES = "aoa/cdi_human.csv"
AOA_SIZE = 8005  # contexts, at every checkpoint


def checkpoint_names(track: str) -> list[str]:
    """Return the names of the checkpoints that BabyLM asks of a track, in order."""
    return [milestone_name(words) for words in checkpoint_words(track)]


# ---- the folder of results ----------------------------------------------------------------------


def collated_file(results: Path) -> Path:
    """Return the file that is submitted; `results` is the folder results/MODEL."""
    return results / "all_full_preds_and_fast_scores_causal.json"


def predictions_file(results: Path, task: str, revision: str = "main") -> Path:
    """Return the predictions of a zero-shot task: of the full data for main, else of the fast."""
    folder = results / revision / "zero_shot" / "causal" / TASKS[task].official
    data = ZERO_SHOT[task].full if revision == "main" else ZERO_SHOT[task].fast
    if task != "reading":
        folder /= data
    return folder / "predictions.json"


def glue_file(results: Path, task: str) -> Path:
    """Return the predictions of a fine-tuned task."""
    return results / "main" / "finetune" / task / "predictions.json"


def acquisition_folder(results: Path) -> Path:
    """Return the folder of surprisal.json and aoa_score.json."""
    return results / "main" / "zero_shot" / "causal" / "AoA_word"


def surprisals_file(results: Path, checkpoint: str) -> Path:
    """Return our file with a checkpoint's part of surprisal.json."""
    return acquisition_folder(results) / f"{checkpoint}.json"


# ---- the leaderboard ----------------------------------------------------------------------------

_README = "README of babylm-eval, July 2026"
_LEADERBOARD = "leaderboard of 24 August 2026, as copied by Oxelra-AI/Qiushi-Engine-Babylm-Research"
# (model, source, columns in percent); a column that was not published is absent. The README also
# has entity tracking with other items, and GLUE without wsc: not these columns.
PUBLISHED = {
    "strict-small": [
        ("GPT-2, 98M (baseline)", _README, {"blimp": 65.08, "supplement": 57.25, "comps": 51.81}),
        (
            "morpheus-10M-v5, Llama, 135M",
            _LEADERBOARD,
            {
                "blimp": 72.53,
                "supplement": 58.29,
                "ewok": 53.2,
                "entity_tracking": 20.38,
                "comps": 54.67,
                "glue": 63.78,
                "global_piqa": 38.65,
                "reading": 2.71,
                "aoa": 0.0,
            },
        ),
        (
            "RecGPT-10M, 34M",
            _LEADERBOARD,
            {
                "blimp": 73.11,
                "supplement": 61.73,
                "ewok": 52.62,
                "entity_tracking": 16.59,
                "comps": 55.43,
                "glue": 66.64,
                "global_piqa": 40.68,
                "reading": 6.92,
                "aoa": 0.0,
            },
        ),
    ],
    "strict": [
        ("GPT-2, 98M (baseline)", _README, {"blimp": 74.53, "supplement": 65.0, "comps": 55.85})
    ],
}


# ---- what to check ------------------------------------------------------------------------------


@dataclass(frozen=True)
class Requirements:
    """The checkpoints and sizes of one track; tests of small runs pass smaller ones."""

    checkpoints: list[str]
    zero_shot: dict[str, OfficialTask]
    glue_sizes: Sizes
    aoa_size: int


def requirements(track: str) -> Requirements:
    """Return what BabyLM asks of a track."""
    return Requirements(checkpoint_names(track), ZERO_SHOT, GLUE_SIZES, AOA_SIZE)
