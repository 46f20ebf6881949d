{{/* Rules that the schema cannot express because they combine values. Each message names the key and the cure. */}}

{{- define "dense-reward.refuse" -}}
{{- include "dense-reward.refuseImages" . -}}
{{- include "dense-reward.refuseLabels" . -}}
{{- include "dense-reward.refuseCheckpoints" . -}}
{{- include "dense-reward.refuseEngine" . -}}
{{- include "dense-reward.refuseMonitoring" . -}}
{{- include "dense-reward.refuseTrainer" . -}}
{{- if and .Values.nodeSelectorTerms (hasKey .Values.affinity "nodeAffinity") -}}
{{- fail "nodeSelectorTerms and affinity.nodeAffinity exclude each other: set only one of them" -}}
{{- end -}}
{{- range .Values.env -}}
{{- if hasPrefix "DENSE_REWARD_" (upper .name) -}}
{{- fail (printf "env: %s is a setting: put it into settings, by its name in lower case without DENSE_REWARD_" .name) -}}
{{- end -}}
{{- if has .name (list "HOME" "USER" "HF_HOME" "HF_HUB_OFFLINE" "HF_TOKEN" "REWARD_KEY") -}}
{{- fail (printf "env: %s is set by the chart: remove it" .name) -}}
{{- end -}}
{{- if and .valueFrom (hasKey . "value") -}}
{{- fail (printf "env: %s has both value and valueFrom: set only one of them" .name) -}}
{{- end -}}
{{- end -}}
{{- end -}}

{{- define "dense-reward.refuseImages" -}}
{{- $trainer := .Values.trainer.image -}}
{{- if and (or $trainer.tag $trainer.digest) (not $trainer.repository) -}}
{{- fail "trainer.image.repository is empty, but trainer.image.tag or trainer.image.digest is set: name the repository" -}}
{{- end -}}
{{- range $key, $tag := dict "image.tag" .Values.image.tag "trainer.image.tag" $trainer.tag -}}
{{- if eq $tag "latest" -}}
{{- fail (printf "%s: latest is not a version, and replicas that start at different times could differ: name a version" $key) -}}
{{- end -}}
{{- end -}}
{{- $c := .Values.checkpoints -}}
{{- $images := dict "checkpoints.s3.image" $c.s3.image "checkpoints.image.reference" $c.image.reference -}}
{{- range $key, $image := merge $images (dict "test.image" .Values.test.image) -}}
{{- if and $image (or (hasSuffix ":latest" $image) (not (contains ":" (last (splitList "/" $image))))) -}}
{{- fail (printf "%s: %s has no tag or the tag latest: name a version or a digest" $key $image) -}}
{{- end -}}
{{- end -}}
{{- end -}}

{{- define "dense-reward.refuseLabels" -}}
{{- $v := .Values -}}
{{- $given := dict "commonLabels" $v.commonLabels "podLabels" $v.podLabels -}}
{{- $_ := set $given "serviceMonitor.labels" $v.serviceMonitor.labels -}}
{{- $_ := set $given "prometheusRule.labels" $v.prometheusRule.labels -}}
{{- $_ := set $given "dashboard.labels" $v.dashboard.labels -}}
{{- $own := list "name" "instance" "component" "version" "managed-by" -}}
{{- range $key, $labels := $given -}}
{{- range $label, $_ := $labels -}}
{{- if has (trimPrefix "app.kubernetes.io/" $label) (append $own "helm.sh/chart") -}}
{{- fail (printf "%s: %s is set by the chart: remove it" $key $label) -}}
{{- end -}}
{{- end -}}
{{- end -}}
{{- end -}}

{{- define "dense-reward.refuseCheckpoints" -}}
{{- $c := .Values.checkpoints -}}
{{- if and (eq $c.source "none") (ne .Values.settings.engine "fake") -}}
{{- fail "checkpoints.source: none is only for settings.engine fake: choose pvc, s3, hub or image" -}}
{{- end -}}
{{- if and (eq $c.source "s3") (not $c.s3.uri) -}}
{{- fail "checkpoints.s3.uri is empty, but checkpoints.source is s3: set it to s3://bucket/folder" -}}
{{- end -}}
{{- if and (eq $c.source "image") (not $c.image.reference) -}}
{{- fail "checkpoints.image.reference is empty, but checkpoints.source is image: name the image and its tag or digest" -}}
{{- end -}}
{{- if and (eq $c.source "image") (semverCompare "<1.31.0-0" .Capabilities.KubeVersion.Version) -}}
{{- fail "checkpoints.source: image needs Kubernetes 1.31 or newer, with the feature ImageVolume: choose another source" -}}
{{- end -}}
{{- if eq $c.source "hub" -}}
{{- if not (and $c.hub.sft $c.hub.reference) -}}
{{- fail "checkpoints.hub.sft and checkpoints.hub.reference are required if checkpoints.source is hub: set both to a hub id" -}}
{{- end -}}
{{- if not (or $c.hub.runId .Values.settings.allow_unrelated) -}}
{{- fail "checkpoints.hub.runId is empty: set it to declare that both checkpoints are from one run, or set settings.allow_unrelated" -}}
{{- end -}}
{{- if $c.pairs -}}
{{- fail "checkpoints.pairs: checkpoints.source hub downloads only one pair: remove pairs, or choose another source" -}}
{{- end -}}
{{- end -}}
{{- end -}}

{{- define "dense-reward.refuseEngine" -}}
{{- $s := .Values.settings -}}
{{- if eq $s.engine "vllm" -}}
{{- $needed := int (default 1 $s.tensor_parallel) -}}
{{- if lt (int .Values.requestGPU) $needed -}}
{{- fail (printf "requestGPU: settings.engine vllm with tensor_parallel %d needs at least %d GPUs" $needed $needed) -}}
{{- end -}}
{{- end -}}
{{- if eq $s.engine "remote" -}}
{{- if not (and $s.sft_url $s.reference_url) -}}
{{- fail "settings.sft_url and settings.reference_url are required if settings.engine is remote: set both" -}}
{{- end -}}
{{- if .Values.checkpoints.pairs -}}
{{- fail "checkpoints.pairs: settings.engine remote serves only one pair: remove pairs" -}}
{{- end -}}
{{- end -}}
{{- if and (has $s.engine (list "remote" "fake")) .Values.requestGPU -}}
{{- fail (printf "requestGPU: settings.engine %s does not use a GPU: set requestGPU to 0" $s.engine) -}}
{{- end -}}
{{- if has $s.engine (list "vllm" "remote") -}}
{{- range $name := list "deterministic" "head_dtype" "norm_dtype" -}}
{{- if get $s $name -}}
{{- fail (printf "settings.%s: settings.engine %s does not support it, only torch does: remove it" $name $s.engine) -}}
{{- end -}}
{{- end -}}
{{- end -}}
{{- if and $s.isolate_keys (not .Values.apiKeys.secretName) -}}
{{- fail "settings.isolate_keys has no effect without API keys: set apiKeys.secretName" -}}
{{- end -}}
{{- end -}}

{{- define "dense-reward.refuseMonitoring" -}}
{{- $m := .Values.serviceMonitor -}}
{{- if and $m.enabled .Values.apiKeys.secretName (not (or $m.secretName .Values.settings.open_metrics)) -}}
{{- fail "serviceMonitor.secretName is empty, but with apiKeys Prometheus needs a key too: set it, or settings.open_metrics" -}}
{{- end -}}
{{- $a := .Values.autoscaling -}}
{{- if and (eq $a.kind "keda") (not $a.keda.serverAddress) -}}
{{- fail "autoscaling.keda.serverAddress is empty, but autoscaling.kind is keda: set it, for example to http://prometheus:9090" -}}
{{- end -}}
{{- $isAsked := or (eq $a.kind "hpa") (and (eq $a.kind "keda") (not $a.keda.query)) -}}
{{- if and $isAsked (not $m.enabled) -}}
{{- $cure := ternary ", or set your own query in autoscaling.keda.query" "" (eq $a.kind "keda") -}}
{{- fail (printf "autoscaling.kind %s needs the series that a ServiceMonitor scrapes: enable serviceMonitor%s" $a.kind $cure) -}}
{{- end -}}
{{- if gt (int $a.minReplicaCount) (int $a.maxReplicaCount) -}}
{{- fail (printf "autoscaling.minReplicaCount is above autoscaling.maxReplicaCount: %d > %d" (int $a.minReplicaCount) (int $a.maxReplicaCount)) -}}
{{- end -}}
{{- end -}}

{{- define "dense-reward.refuseTrainer" -}}
{{- $t := .Values.trainer -}}
{{- if ne $t.kind "none" -}}
{{- if not $t.jobs -}}
{{- fail (printf "trainer.jobs is empty, but trainer.kind is %s: list a job, or set trainer.kind to none" $t.kind) -}}
{{- end -}}
{{- if ne .Values.checkpoints.source "pvc" -}}
{{- fail (printf "trainer.kind: the trainer writes to a claim, but checkpoints.source is %s: set it to pvc" .Values.checkpoints.source) -}}
{{- end -}}
{{- $names := list -}}
{{- range $t.jobs -}}
{{- $names = append $names .name -}}
{{- end -}}
{{- if ne (len $names) (len (uniq $names)) -}}
{{- fail (printf "trainer.jobs: two jobs have the same name: %s" (join ", " $names)) -}}
{{- end -}}
{{- end -}}
{{- end -}}
