{{/* Where the checkpoints come from. */}}

{{- define "dense-reward.isDownloaded" -}}
{{- if has .Values.checkpoints.source (list "s3" "hub") -}}true{{- end -}}
{{- end -}}

{{/* Whether the checkpoints are in a claim, that of checkpoints.pvc. */}}
{{- define "dense-reward.isInClaim" -}}
{{- $c := .Values.checkpoints -}}
{{- if or (eq $c.source "pvc") (and (eq $c.source "hub") (eq $c.hub.cache "claim")) -}}true{{- end -}}
{{- end -}}

{{/* Whether a claim is filled after its pods were created: by people, if the chart makes it, or by the trainer. */}}
{{- define "dense-reward.isFilledLater" -}}
{{- $c := .Values.checkpoints -}}
{{- if and (eq $c.source "pvc") (or (not $c.pvc.existingClaim) (ne .Values.trainer.kind "none")) -}}true{{- end -}}
{{- end -}}

{{/* Pods on several nodes use the claim: more than one replica, or jobs of the trainer. */}}
{{- define "dense-reward.isShared" -}}
{{- $v := .Values -}}
{{- if or (ne $v.autoscaling.kind "none") (gt (int $v.replicaCount) 1) (ne $v.trainer.kind "none") -}}true{{- end -}}
{{- end -}}

{{/* JSON: access modes of the claim that the chart creates. An existing one keeps its own: they cannot be changed. */}}
{{- define "dense-reward.accessModes" -}}
{{- $derived := list (ternary "ReadWriteMany" "ReadWriteOnce" (ne (include "dense-reward.isShared" .) "")) -}}
{{- $made := lookup "v1" "PersistentVolumeClaim" .Release.Namespace (include "dense-reward.claim" .) -}}
{{- toJson (default $derived (default (dig "spec" "accessModes" list $made) .Values.checkpoints.pvc.pvcAccessMode)) -}}
{{- end -}}

{{/* A volume of one node is not mounted on a second node before the old replica has ended. */}}
{{- define "dense-reward.strategy" -}}
{{- $isNew := and (include "dense-reward.isInClaim" .) (not .Values.checkpoints.pvc.existingClaim) -}}
{{- $isAlone := and $isNew (not (include "dense-reward.isShared" .)) -}}
{{- default (ternary "Recreate" "RollingUpdate" (not (not $isAlone))) .Values.strategy -}}
{{- end -}}

{{/* JSON list: the folders of all pairs. */}}
{{- define "dense-reward.folders" -}}
{{- $c := .Values.checkpoints -}}
{{- $folders := list -}}
{{- range $c.pairs -}}
{{- $folders = append (append $folders .sft) .reference -}}
{{- end -}}
{{- if not $c.pairs -}}
{{- $folders = list (include "dense-reward.sftFolder" .) (include "dense-reward.referenceFolder" .) -}}
{{- end -}}
{{- uniq $folders | toJson -}}
{{- end -}}

{{/* What is adopted from the hub has its own folder, so that a claim can hold several versions. */}}
{{- define "dense-reward.sftFolder" -}}
{{- .Values.checkpoints.sft -}}{{- include "dense-reward.hubVersion" (dict "c" .Values.checkpoints "id" .Values.checkpoints.hub.sft) -}}
{{- end -}}

{{- define "dense-reward.referenceFolder" -}}
{{- .Values.checkpoints.reference -}}{{- include "dense-reward.hubVersion" (dict "c" .Values.checkpoints "id" .Values.checkpoints.hub.reference) -}}
{{- end -}}

{{- define "dense-reward.hubVersion" -}}
{{- if eq .c.source "hub" -}}
-{{- list .id .c.hub.runId .c.hub.renderer | toJson | sha256sum | trunc 8 -}}
{{- end -}}
{{- end -}}

{{- define "dense-reward.checkpointsVolume" -}}
{{- $c := .Values.checkpoints -}}
- name: checkpoints
{{- if include "dense-reward.isInClaim" . }}
  persistentVolumeClaim:
    claimName: {{ include "dense-reward.claim" . | quote }}
{{- else if eq $c.source "image" }}
  image:
    reference: {{ $c.image.reference | quote }}
    pullPolicy: {{ $c.image.pullPolicy }}
{{- else if $c.downloadStorageClass }}
  ephemeral:
    volumeClaimTemplate:
      spec:
        accessModes: [ReadWriteOnce]
        storageClassName: {{ $c.downloadStorageClass | quote }}
        resources:
          requests:
            storage: {{ $c.downloadSize | quote }}
{{- else }}
  emptyDir:
    sizeLimit: {{ $c.downloadSize | quote }}
{{- end }}
{{- end -}}

{{/* The init container that waits until a claim holds the checkpoints, and into which they can be copied. */}}
{{- define "dense-reward.wait" -}}
{{- $c := .Values.checkpoints -}}
- name: checkpoints
  image: {{ include "dense-reward.image" . | quote }}
  imagePullPolicy: {{ .Values.image.pullPolicy }}
  command: [python3, -c]
  args:
    - |
      {{- .Files.Get "files/wait.py" | nindent 6 }}
    - {{ $c.mountPath | quote }}
    {{- range include "dense-reward.folders" . | fromJsonArray }}
    - {{ . | quote }}
    {{- end }}
  env:
    {{- include "dense-reward.homeEnv" . | nindent 4 }}
    - name: NAMESPACE
      value: {{ .Release.Namespace | quote }}
  resources:
    {{- include "dense-reward.resources" (dict "cpu" "100m" "memory" "256Mi" "limitMemory" "" "gpu" 0) | nindent 4 }}
  securityContext:
    {{- include "dense-reward.containerSecurity" . | nindent 4 }}
  volumeMounts:
    - name: checkpoints
      mountPath: {{ $c.mountPath | quote }}
    - name: tmp
      mountPath: /tmp
{{- end -}}

{{- define "dense-reward.download" -}}
{{- $c := .Values.checkpoints -}}
- name: checkpoints
  {{- if eq $c.source "s3" }}
  image: {{ $c.s3.image | quote }}
  command: [aws]
  args:
    - s3
    - sync
    - {{ $c.s3.uri | quote }}
    - {{ $c.mountPath | quote }}
    - --only-show-errors
  {{- else }}
  image: {{ include "dense-reward.image" . | quote }}
  imagePullPolicy: {{ .Values.image.pullPolicy }}
  command: [sh, -ec]
  args:
    - |
      {{- .Files.Get "files/adopt.sh" | nindent 6 }}
  {{- end }}
  env:
    {{- include "dense-reward.homeEnv" . | nindent 4 }}
    {{- include "dense-reward.givenEnv" . | nindent 4 }}
    {{- if eq $c.source "s3" }}
    {{- include "dense-reward.s3Env" $c.s3 | nindent 4 }}
    {{- else }}
    {{- include "dense-reward.hubEnv" . | nindent 4 }}
    {{- end }}
  resources:
    {{- $memory := default .Values.requestMemory $c.downloadMemory }}
    {{- $asked := dict "cpu" "1" "memory" $memory "limitMemory" "" "gpu" 0 }}
    {{- $isElsewhere := or (ne $c.downloadStorageClass "") (ne (include "dense-reward.isInClaim" .) "") }}
    {{- $disk := ternary "" $c.downloadSize $isElsewhere }}
    {{- include "dense-reward.resources" (merge $asked (dict "disk" $disk)) | nindent 4 }}
  securityContext:
    {{- include "dense-reward.containerSecurity" . | nindent 4 }}
  volumeMounts:
    - name: checkpoints
      mountPath: {{ $c.mountPath | quote }}
    - name: tmp
      mountPath: /tmp
    {{- include "dense-reward.caMount" . | nindent 4 }}
    {{- include "dense-reward.extra" .Values.extraVolumeMounts | nindent 4 }}
{{- end -}}

{{/* The port to download from: the one in checkpoints.s3.endpointUrl, else the default port of its scheme, else 443. */}}
{{- define "dense-reward.downloadPort" -}}
{{- $url := "" -}}
{{- if eq .Values.checkpoints.source "s3" -}}
{{- $url = .Values.checkpoints.s3.endpointUrl -}}
{{- end -}}
{{- $port := regexFind ":[0-9]+$" (urlParse $url).host | trimPrefix ":" -}}
{{- default (ternary "80" "443" (hasPrefix "http:" $url)) $port -}}
{{- end -}}

{{- define "dense-reward.s3Env" -}}
{{- with .endpointUrl }}
- name: AWS_ENDPOINT_URL
  value: {{ . | quote }}
{{- end }}
{{- with .region }}
- name: AWS_REGION
  value: {{ . | quote }}
{{- end }}
{{- if .secretName }}
{{- range list "AWS_ACCESS_KEY_ID" "AWS_SECRET_ACCESS_KEY" }}
- name: {{ . | quote }}
  valueFrom:
    secretKeyRef:
      name: {{ $.secretName | quote }}
      key: {{ . | quote }}
{{- end }}
{{- end }}
{{- end -}}

{{/* Manifests refer to the hub's files by path, so the cache must be on the volume that the service reads. */}}
{{- define "dense-reward.hubEnv" -}}
{{- $c := .Values.checkpoints -}}
- name: HF_HOME
  value: {{ $c.mountPath }}/hub
- name: CHECKPOINTS
  value: {{ $c.mountPath | quote }}
- name: SFT
  value: {{ $c.hub.sft | quote }}
- name: SFT_FOLDER
  value: {{ include "dense-reward.sftFolder" . | quote }}
- name: REFERENCE
  value: {{ $c.hub.reference | quote }}
- name: REFERENCE_FOLDER
  value: {{ include "dense-reward.referenceFolder" . | quote }}
- name: RUN_ID
  value: {{ $c.hub.runId | quote }}
- name: RENDERER
  value: {{ $c.hub.renderer | quote }}
{{- include "dense-reward.hubToken" . }}
{{- end -}}

{{- define "dense-reward.hubToken" -}}
{{- with .Values.hf_token }}
{{- if .secretName }}
- name: HF_TOKEN
  valueFrom:
    secretKeyRef:
      name: {{ .secretName | quote }}
      key: {{ .secretKey | quote }}
{{- end }}
{{- end }}
{{- end -}}
