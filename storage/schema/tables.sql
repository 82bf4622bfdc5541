-- The index over manifests and metric rows. It holds nothing that cannot be rebuilt from the files.
-- Every row of every table carries run_id, fingerprint and created_at (UTC); `source` is the file it came from.

CREATE TABLE IF NOT EXISTS about (schema_version INTEGER NOT NULL);

-- Files taken in so far.
CREATE TABLE IF NOT EXISTS sources (source VARCHAR PRIMARY KEY, indexed_at TIMESTAMP NOT NULL);

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
CREATE TABLE IF NOT EXISTS current_manifests (
    experiment VARCHAR, stage VARCHAR NOT NULL, trait VARCHAR,
    run_id VARCHAR NOT NULL, fingerprint VARCHAR NOT NULL, created_at TIMESTAMP NOT NULL, source VARCHAR NOT NULL
);

-- Metric rows whose `table` is missing or unknown; what has no column here is in `extra`.
CREATE TABLE IF NOT EXISTS metrics (
    experiment VARCHAR, stage VARCHAR NOT NULL, trait VARCHAR,
    run_id VARCHAR NOT NULL, fingerprint VARCHAR NOT NULL, created_at TIMESTAMP NOT NULL, source VARCHAR NOT NULL,
    name VARCHAR, value DOUBLE, method VARCHAR, layer BIGINT, position VARCHAR, component VARCHAR, extra JSON
);
