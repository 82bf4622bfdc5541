-- The index over manifests and metric rows. It holds nothing that cannot be rebuilt from the files.
-- Every row of every table carries run_id, fingerprint and created_at (UTC); `source` is the file it came from.

-- Which version of this schema the file was made with.
CREATE TABLE IF NOT EXISTS about (schema_mark VARCHAR NOT NULL);

-- Files taken in so far.
CREATE TABLE IF NOT EXISTS sources (source VARCHAR PRIMARY KEY, indexed_at TIMESTAMP NOT NULL);

-- In which state each current manifest was read last.
CREATE TABLE IF NOT EXISTS seen (manifest VARCHAR PRIMARY KEY, mark VARCHAR NOT NULL);

-- Every manifest ever committed. experiment is NULL for what all experiments share, trait is NULL for tables.
CREATE TABLE IF NOT EXISTS manifests (
    experiment VARCHAR, stage VARCHAR NOT NULL, trait VARCHAR,
    run_id VARCHAR NOT NULL, fingerprint VARCHAR NOT NULL, created_at TIMESTAMP NOT NULL, source VARCHAR NOT NULL,
    status VARCHAR NOT NULL, code_version VARCHAR NOT NULL,
    options JSON, summary JSON, libraries JSON, n_files BIGINT, n_bytes BIGINT
);

-- One row per input of a manifest: what it was made from.
CREATE TABLE IF NOT EXISTS inputs (
    experiment VARCHAR, stage VARCHAR NOT NULL, trait VARCHAR,
    run_id VARCHAR NOT NULL, fingerprint VARCHAR NOT NULL, created_at TIMESTAMP NOT NULL, source VARCHAR NOT NULL,
    input VARCHAR NOT NULL, input_fingerprint VARCHAR NOT NULL
);

-- Which manifest counts now.
CREATE TABLE IF NOT EXISTS current_pointers (
    experiment VARCHAR, stage VARCHAR NOT NULL, trait VARCHAR,
    run_id VARCHAR NOT NULL, fingerprint VARCHAR NOT NULL, created_at TIMESTAMP NOT NULL, source VARCHAR NOT NULL
);

-- The tables below hold metric rows: a row's `table` names the table, `extra` holds what has no column there.

-- One row per scenario line of a trait (the stage `scenarios`).
CREATE TABLE IF NOT EXISTS scenarios (
    experiment VARCHAR, stage VARCHAR NOT NULL, trait VARCHAR,
    run_id VARCHAR NOT NULL, fingerprint VARCHAR NOT NULL, created_at TIMESTAMP NOT NULL, source VARCHAR NOT NULL,
    polarity VARCHAR, scenario_index BIGINT, line BIGINT, prompt VARCHAR, system_prompt VARCHAR, extra JSON
);

-- One row per generated response.
CREATE TABLE IF NOT EXISTS responses (
    experiment VARCHAR, stage VARCHAR NOT NULL, trait VARCHAR,
    run_id VARCHAR NOT NULL, fingerprint VARCHAR NOT NULL, created_at TIMESTAMP NOT NULL, source VARCHAR NOT NULL,
    polarity VARCHAR, scenario_index BIGINT, line BIGINT, pair BIGINT, row_key VARCHAR, question VARCHAR,
    system_prompt VARCHAR, answer VARCHAR, prompt_tokens BIGINT, response_tokens BIGINT,
    finish_reason VARCHAR, extra JSON
);

-- One row per judgement. subject: scenarios, responses. score is NULL where the judge abstained.
CREATE TABLE IF NOT EXISTS judge_scores (
    experiment VARCHAR, stage VARCHAR NOT NULL, trait VARCHAR,
    run_id VARCHAR NOT NULL, fingerprint VARCHAR NOT NULL, created_at TIMESTAMP NOT NULL, source VARCHAR NOT NULL,
    subject VARCHAR, polarity VARCHAR, scenario_index BIGINT, row_key VARCHAR,
    score DOUBLE, mass DOUBLE, abstained VARCHAR, verdict VARCHAR,
    judge VARCHAR, judge_fingerprint VARCHAR, stand_in BOOLEAN, extra JSON
);

-- One row per captured site.
CREATE TABLE IF NOT EXISTS activations (
    experiment VARCHAR, stage VARCHAR NOT NULL, trait VARCHAR,
    run_id VARCHAR NOT NULL, fingerprint VARCHAR NOT NULL, created_at TIMESTAMP NOT NULL, source VARCHAR NOT NULL,
    position VARCHAR, component VARCHAR, n_layers BIGINT, width BIGINT, train_positive BIGINT,
    train_negative BIGINT, val_positive BIGINT, val_negative BIGINT, excluded BIGINT, extra JSON
);

-- One row per vector: one layer of one method.
CREATE TABLE IF NOT EXISTS vectors (
    experiment VARCHAR, stage VARCHAR NOT NULL, trait VARCHAR,
    run_id VARCHAR NOT NULL, fingerprint VARCHAR NOT NULL, created_at TIMESTAMP NOT NULL, source VARCHAR NOT NULL,
    position VARCHAR, component VARCHAR, method VARCHAR, layer BIGINT, norm DOUBLE, median_norm DOUBLE,
    norm_over_median_norm DOUBLE, baseline DOUBLE, train_acc DOUBLE, sign BIGINT, mean_positive DOUBLE,
    mean_negative DOUBLE, extra JSON
);

-- One row per evaluated vector, on the held-out rows.
CREATE TABLE IF NOT EXISTS evaluations (
    experiment VARCHAR, stage VARCHAR NOT NULL, trait VARCHAR,
    run_id VARCHAR NOT NULL, fingerprint VARCHAR NOT NULL, created_at TIMESTAMP NOT NULL, source VARCHAR NOT NULL,
    position VARCHAR, component VARCHAR, method VARCHAR, layer BIGINT, chosen BOOLEAN,
    train_accuracy DOUBLE, cv_auc DOUBLE, cv_accuracy DOUBLE, split_half_cosine DOUBLE,
    val_accuracy DOUBLE, val_accuracy_low DOUBLE, val_accuracy_high DOUBLE,
    val_auc DOUBLE, val_auc_low DOUBLE, val_auc_high DOUBLE, effect_size_d DOUBLE, separation DOUBLE,
    overlap DOUBLE, permutation_p DOUBLE, null_percentile DOUBLE, raw_norm DOUBLE, median_norm DOUBLE,
    raw_norm_over_median_norm DOUBLE, energy_top3 DOUBLE, threshold DOUBLE, extra JSON
);

-- One row per steered setting and half (search, report). kind: baseline, vector, random, prompting, combination;
-- best: the setting that is published, on the report half.
CREATE TABLE IF NOT EXISTS steering_runs (
    experiment VARCHAR, stage VARCHAR NOT NULL, trait VARCHAR,
    run_id VARCHAR NOT NULL, fingerprint VARCHAR NOT NULL, created_at TIMESTAMP NOT NULL, source VARCHAR NOT NULL,
    kind VARCHAR, name VARCHAR, half VARCHAR, position VARCHAR, component VARCHAR, method VARCHAR, layer BIGINT,
    dose DOUBLE, coefficient DOUBLE, n BIGINT, trait_mean DOUBLE, coherence_mean DOUBLE, change DOUBLE,
    change_low DOUBLE, change_high DOUBLE, wrong_way DOUBLE, success_rate DOUBLE, distinct_3 DOUBLE,
    abstentions BIGINT, best BOOLEAN, validated BOOLEAN, extra JSON
);

-- One row per steered answer with its scores; a score is NULL where the judge abstained.
CREATE TABLE IF NOT EXISTS generations (
    experiment VARCHAR, stage VARCHAR NOT NULL, trait VARCHAR,
    run_id VARCHAR NOT NULL, fingerprint VARCHAR NOT NULL, created_at TIMESTAMP NOT NULL, source VARCHAR NOT NULL,
    kind VARCHAR, name VARCHAR, half VARCHAR, position VARCHAR, component VARCHAR, method VARCHAR, layer BIGINT,
    dose DOUBLE, coefficient DOUBLE, question_index BIGINT, question VARCHAR, response VARCHAR,
    trait_score DOUBLE, coherence_score DOUBLE, abstained VARCHAR, distinct_3 DOUBLE,
    finish_reason VARCHAR, tokens BIGINT, extra JSON
);

-- One row per result that was computed: what it took. rows and tokens went through the model anew, cached ones took
-- nothing; seconds add up to the stage's duration in the run; model_seconds and judge_seconds are the trait's share.
-- judge_cost_usd is NULL where nobody said a price.
CREATE TABLE IF NOT EXISTS work (
    experiment VARCHAR, stage VARCHAR NOT NULL, trait VARCHAR,
    run_id VARCHAR NOT NULL, fingerprint VARCHAR NOT NULL, created_at TIMESTAMP NOT NULL, source VARCHAR NOT NULL,
    seconds DOUBLE, model VARCHAR, device VARCHAR, rows BIGINT, prompt_tokens BIGINT, tokens BIGINT,
    model_seconds DOUBLE, load_seconds DOUBLE, rows_per_second DOUBLE, tokens_per_second DOUBLE,
    gpu_peak_bytes BIGINT, host_peak_bytes BIGINT, judge VARCHAR, judge_seconds DOUBLE, judge_calls BIGINT,
    judge_prompt_tokens BIGINT, judge_completion_tokens BIGINT, judge_cost_usd DOUBLE, extra JSON
);

-- Numbers by name; also every metric row whose `table` is missing or unknown.
CREATE TABLE IF NOT EXISTS metrics (
    experiment VARCHAR, stage VARCHAR NOT NULL, trait VARCHAR,
    run_id VARCHAR NOT NULL, fingerprint VARCHAR NOT NULL, created_at TIMESTAMP NOT NULL, source VARCHAR NOT NULL,
    name VARCHAR, value DOUBLE, method VARCHAR, layer BIGINT, position VARCHAR, component VARCHAR, extra JSON
);
