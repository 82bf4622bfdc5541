-- Views over tables.sql. `current_*` hold what counts now; the tables themselves are the history.

CREATE OR REPLACE VIEW current_manifests AS
SELECT m.* FROM manifests m
JOIN current_pointers c ON m.source = c.source;

CREATE OR REPLACE VIEW current_inputs AS
SELECT i.* FROM inputs i
JOIN current_pointers c ON i.source = c.source;

CREATE OR REPLACE VIEW current_scenarios AS
SELECT t.* FROM scenarios t
JOIN current_pointers c
  ON t.stage = c.stage AND t.fingerprint = c.fingerprint AND t.run_id = c.run_id
 AND t.trait IS NOT DISTINCT FROM c.trait AND t.experiment IS NOT DISTINCT FROM c.experiment;

CREATE OR REPLACE VIEW current_responses AS
SELECT t.* FROM responses t
JOIN current_pointers c
  ON t.stage = c.stage AND t.fingerprint = c.fingerprint AND t.run_id = c.run_id
 AND t.trait IS NOT DISTINCT FROM c.trait AND t.experiment IS NOT DISTINCT FROM c.experiment;

CREATE OR REPLACE VIEW current_judge_scores AS
SELECT t.* FROM judge_scores t
JOIN current_pointers c
  ON t.stage = c.stage AND t.fingerprint = c.fingerprint AND t.run_id = c.run_id
 AND t.trait IS NOT DISTINCT FROM c.trait AND t.experiment IS NOT DISTINCT FROM c.experiment;

CREATE OR REPLACE VIEW current_activations AS
SELECT t.* FROM activations t
JOIN current_pointers c
  ON t.stage = c.stage AND t.fingerprint = c.fingerprint AND t.run_id = c.run_id
 AND t.trait IS NOT DISTINCT FROM c.trait AND t.experiment IS NOT DISTINCT FROM c.experiment;

CREATE OR REPLACE VIEW current_vectors AS
SELECT t.* FROM vectors t
JOIN current_pointers c
  ON t.stage = c.stage AND t.fingerprint = c.fingerprint AND t.run_id = c.run_id
 AND t.trait IS NOT DISTINCT FROM c.trait AND t.experiment IS NOT DISTINCT FROM c.experiment;

CREATE OR REPLACE VIEW current_evaluations AS
SELECT t.* FROM evaluations t
JOIN current_pointers c
  ON t.stage = c.stage AND t.fingerprint = c.fingerprint AND t.run_id = c.run_id
 AND t.trait IS NOT DISTINCT FROM c.trait AND t.experiment IS NOT DISTINCT FROM c.experiment;

CREATE OR REPLACE VIEW current_steering_runs AS
SELECT t.* FROM steering_runs t
JOIN current_pointers c
  ON t.stage = c.stage AND t.fingerprint = c.fingerprint AND t.run_id = c.run_id
 AND t.trait IS NOT DISTINCT FROM c.trait AND t.experiment IS NOT DISTINCT FROM c.experiment;

CREATE OR REPLACE VIEW current_generations AS
SELECT t.* FROM generations t
JOIN current_pointers c
  ON t.stage = c.stage AND t.fingerprint = c.fingerprint AND t.run_id = c.run_id
 AND t.trait IS NOT DISTINCT FROM c.trait AND t.experiment IS NOT DISTINCT FROM c.experiment;

CREATE OR REPLACE VIEW current_work AS
SELECT t.* FROM work t
JOIN current_pointers c
  ON t.stage = c.stage AND t.fingerprint = c.fingerprint AND t.run_id = c.run_id
 AND t.trait IS NOT DISTINCT FROM c.trait AND t.experiment IS NOT DISTINCT FROM c.experiment;

CREATE OR REPLACE VIEW current_metrics AS
SELECT t.* FROM metrics t
JOIN current_pointers c
  ON t.stage = c.stage AND t.fingerprint = c.fingerprint AND t.run_id = c.run_id
 AND t.trait IS NOT DISTINCT FROM c.trait AND t.experiment IS NOT DISTINCT FROM c.experiment;

-- The views that follow sum up many results; their run_id, fingerprint and created_at are those of the newest.

CREATE OR REPLACE VIEW experiments AS
SELECT experiment, count(DISTINCT trait) AS traits, count(DISTINCT stage) AS stages,
       count(DISTINCT run_id) AS runs, min(created_at) AS first_result, max(created_at) AS last_result,
       max_by(run_id, created_at) AS run_id, max_by(fingerprint, created_at) AS fingerprint,
       max(created_at) AS created_at
FROM manifests WHERE experiment IS NOT NULL GROUP BY experiment;

CREATE OR REPLACE VIEW traits AS
SELECT trait, split_part(trait, '/', 1) AS category, count(DISTINCT experiment) AS experiments,
       min(created_at) AS first_result, max(created_at) AS last_result,
       max_by(run_id, created_at) AS run_id, max_by(fingerprint, created_at) AS fingerprint,
       max(created_at) AS created_at
FROM manifests WHERE trait IS NOT NULL GROUP BY trait;

-- Runs of Dagster (or of whatever else gave the run_id), with what each of them made.
CREATE OR REPLACE VIEW runs AS
SELECT run_id, count(*) AS results, count(DISTINCT trait) AS traits,
       list_sort(list(DISTINCT stage)) AS stages, list_sort(list(DISTINCT experiment)) AS experiments,
       min(created_at) AS first_result, max(created_at) AS last_result,
       max_by(fingerprint, created_at) AS fingerprint, max(created_at) AS created_at
FROM manifests GROUP BY run_id;

-- Every model that took part, by the role under which a stage's options name it.
CREATE OR REPLACE VIEW models AS
SELECT role, (options ->> ('$.' || role || '.model')) AS model,
       (options ->> ('$.' || role || '.revision')) AS revision, (options ->> ('$.' || role || '.dtype')) AS dtype,
       (options ->> ('$.' || role || '.quantization')) AS quantization,
       (options ->> ('$.' || role || '.adapter')) AS adapter,
       list_sort(list(DISTINCT stage)) AS stages, count(DISTINCT trait) AS traits, max(created_at) AS last_result,
       max_by(run_id, created_at) AS run_id, max_by(fingerprint, created_at) AS fingerprint,
       max(created_at) AS created_at
FROM manifests, (VALUES ('model'), ('extraction_model'), ('application_model')) AS roles(role)
WHERE (options ->> ('$.' || role || '.model')) IS NOT NULL
GROUP BY ALL;

-- Every judge that scored something, with its whole identity.
CREATE OR REPLACE VIEW judges AS
SELECT (options -> '$.judge') AS judge, list_sort(list(DISTINCT stage)) AS stages,
       count(DISTINCT trait) AS traits, min(created_at) AS first_result, max(created_at) AS last_result,
       max_by(run_id, created_at) AS run_id, max_by(fingerprint, created_at) AS fingerprint,
       max(created_at) AS created_at
FROM manifests WHERE (options -> '$.judge') IS NOT NULL GROUP BY (options -> '$.judge');

-- One row per current result and each result that it was made from, at any distance (depth 1: a direct input).
-- `is_current`: the input still is what counts now, so nothing above it is out of date because of it; NULL for
-- what is no stored result, such as the files of a trait's folder.
CREATE OR REPLACE VIEW chain AS
WITH RECURSIVE made AS (
    SELECT c.experiment, c.stage, c.trait, c.fingerprint, 1 AS depth,
           i.input, i.input_fingerprint, i.experiment AS holder
    FROM current_pointers c JOIN inputs i ON i.source = c.source
    UNION
    SELECT made.experiment, made.stage, made.trait, made.fingerprint, made.depth + 1,
           i.input, i.input_fingerprint, i.experiment
    FROM made JOIN inputs i
      ON i.fingerprint = made.input_fingerprint
     AND (i.experiment IS NULL OR i.experiment IS NOT DISTINCT FROM made.holder)
)
SELECT DISTINCT made.experiment, made.stage, made.trait, made.fingerprint, made.depth,
       made.input, made.input_fingerprint, up.code_version AS input_code_version,
       up.created_at AS input_created_at, up.run_id AS input_run_id,
       CASE WHEN up.fingerprint IS NOT NULL THEN now_up.fingerprint IS NOT NULL END AS is_current
FROM made
LEFT JOIN (
    SELECT experiment, stage, trait, fingerprint, max_by(code_version, created_at) AS code_version,
           max(created_at) AS created_at, max_by(run_id, created_at) AS run_id
    FROM manifests GROUP BY ALL
) up ON up.fingerprint = made.input_fingerprint
    AND (up.experiment IS NULL OR up.experiment IS NOT DISTINCT FROM made.experiment)
LEFT JOIN current_pointers now_up ON now_up.fingerprint = made.input_fingerprint
    AND (now_up.experiment IS NULL OR now_up.experiment IS NOT DISTINCT FROM made.experiment);

-- Throughput and spending of each run, stage by stage.
CREATE OR REPLACE VIEW run_work AS
SELECT run_id, experiment, stage, any_value(model) AS model, any_value(device) AS device,
       count(*) AS results, sum(seconds) AS seconds, sum(rows) AS rows, sum(tokens) AS tokens,
       sum(rows) / nullif(sum(model_seconds), 0) AS rows_per_second,
       sum(tokens) / nullif(sum(model_seconds), 0) AS tokens_per_second,
       max(gpu_peak_bytes) AS gpu_peak_bytes, max(host_peak_bytes) AS host_peak_bytes,
       sum(judge_calls) AS judge_calls, sum(judge_prompt_tokens + judge_completion_tokens) AS judge_tokens,
       sum(judge_cost_usd) AS judge_cost_usd, min(created_at) AS first_result
FROM work GROUP BY run_id, experiment, stage;
